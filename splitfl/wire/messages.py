"""The messages of the protocol: one frozen dataclass each, every field typed and bounded.

A connection opens with ``Hello`` and ``Welcome``. From then on the client asks and the server answers: each
request carries a sequence number, its answer carries the same one, and the server may take its time (waiting
for a round to open is a request like any other). So a client that comes back after a fault repeats what is
unanswered, and nothing else is needed. ``round``, ``step`` and ``micro`` count from 0; -1 means "none yet".

This module knows bytes and numbers, no torch: a tensor is ``TensorBytes``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, InstanceOf

PROTOCOL_VERSIONS = (3,)

#: bytes an element takes, by the wire's dtype name; i8g also has a scale of two bytes for each group of channels
ELEMENT_BYTES = {"u8": 1, "f32": 4, "bf16": 2, "f16": 2, "i8g": 1}
GROUP = 64  # neighbouring channels that share a scale in i8g
MAX_ECHO_BYTES = 4 << 20

Count = Annotated[int, Field(ge=0, le=2**53)]
Index = Annotated[int, Field(ge=-1, le=2**31)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CLIENT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=CLIENT_NAME)]
RecordName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # of a released activation: opaque, the client's choice
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,128}$")]
Text = Annotated[str, Field(max_length=2000)]
PEM_TEXT = r"^-----BEGIN [A-Z ]+-----\n[A-Za-z0-9+/=\n]+-----END [A-Z ]+-----\n$"
Codec = Literal["", "fp32", "bf16", "fp16", "int8"]  # "" = the federation's own
Pem = Annotated[str, Field(max_length=8000, pattern=PEM_TEXT)]

ErrorCode = Literal[
    "version",  # no protocol version in common
    "name_taken",  # another live client has this name
    "bad_message",  # bytes that break the protocol
    "damaged",  # bytes that changed on the way: connect again
    "bad_tensor",  # NaN, infinity or a shape that does not fit
    "bad_cut",  # the federation does not allow this cut
    "bad_plan",  # micro-batches that do not divide a step, or a number format that is not allowed
    "not_found",  # no blob with this hash
    "wrong_round",  # not the round that is open
    "over_limit",  # more bytes or requests than allowed
    "storage",  # the server's disk
    "ledger",  # a ledger that went back, or is another one
    "internal",  # a fault of the server's own
    "unencrypted",  # a plain socket where only TLS is taken
    "certificate_missing",  # TLS without a client certificate
    "certificate_unknown",  # of this server's authority, but not in its books
    "revoked",  # the certificate was revoked, or replaced by a newer one
    "name_mismatch",  # Hello names another client than the certificate
    "token_unknown",  # no open invitation of this name has this token
    "token_used",  # another key has been enrolled with it
    "token_expired",  # the invitation is over
    "bad_request",  # a signing request that cannot be granted
]
ERROR_CODES: tuple[str, ...] = get_args(ErrorCode)


@dataclass(frozen=True)
class TensorBytes:
    """A tensor on the wire: little-endian, row-major; ``data`` is exactly as long as dtype and shape say."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def nbytes(self) -> int:
        return expected_bytes(self.dtype, self.shape)


def expected_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes. Raises KeyError for a dtype the wire does not know."""
    size = ELEMENT_BYTES[dtype] * math.prod(shape)
    if dtype == "i8g":
        size += 2 * math.prod(shape[:-1]) * group_count(shape[-1] if shape else 1)
    return size


def group_count(width: int) -> int:
    """How many groups a vector of ``width`` channels has; the last may be smaller."""
    return -(-width // GROUP)


Tensor = InstanceOf[TensorBytes]


@dataclass(frozen=True)
class Hello:
    """Client's first word. ``resume`` is the token of an earlier Welcome; ``round`` the last one it holds durably.

    ``fresh`` says that the client lost that session's state (it crashed): the server replaces the session.
    ``n_bottom`` and ``n_top`` of -1 take the federation's own cut, ``micro_batches`` of 0 and ``codec`` of "" its own
    pieces of a step and number format; else they are what the client plans for itself. ``next_seq`` is the number of
    its next request: a client that forgot some that it has sent cannot resume.
    """

    versions: tuple[Annotated[int, Field(ge=1, le=10_000)], ...]
    name: Name
    resume: Token = ""
    fresh: bool = False
    round: Index = -1
    n_bottom: Index = -1
    n_top: Index = -1
    software: Annotated[str, Field(max_length=64)] = ""
    next_seq: Count | None = None
    micro_batches: Annotated[int, Field(ge=0, le=2**16)] = 0
    codec: Codec = ""


@dataclass(frozen=True)
class Welcome:
    """The server's answer to Hello: what was agreed.

    ``resumed`` says that the session of ``resume`` lives on; else the client goes back to its state after
    ``round``, the last durable one. ``settings`` is the federation's JSON, ``manifest`` the hash of the list of
    assets (config, tokenizer, tensors). ``ledger_rows`` and ``ledger_head`` are what the server countersigned last
    for this client; ``signer`` is the public key (Ed25519) that it signs with.
    """

    version: Count
    session: Token
    resumed: bool
    incarnation: Token
    round: Index
    n_bottom: Count
    n_top: Count
    settings: Annotated[str, Field(max_length=60_000)]
    manifest: Sha256
    signer: Key = "0" * 64
    ledger_rows: Count = 0
    ledger_head: Key = "0" * 64


@dataclass(frozen=True)
class Refused:
    """The connection ends: Hello was not acceptable, or the bytes broke the protocol."""

    code: ErrorCode
    reason: Text
    remedy: Text = ""


@dataclass(frozen=True)
class AskAuthority:
    """Instead of Hello: "whose certificates are yours?" Answered by Authority; then the connection closes."""


@dataclass(frozen=True)
class Authority:
    """The server's certificate authority, as PEM. Who was invited knows its fingerprint and compares."""

    certificate: Pem


@dataclass(frozen=True)
class Enrol:
    """Instead of Hello, on TLS that the authority vouches for: trade an invitation's ``token`` for a certificate.

    ``request`` is a PKCS#10 signing request in PEM; the key behind it never leaves the client. Answered by Enrolled
    or Refused; then the connection closes. The same token with the same key gets the same certificate again.
    """

    name: Name
    token: Token
    request: Pem


@dataclass(frozen=True)
class Enrolled:
    """The client's ``certificate``, as PEM, to be shown on every connection from now on."""

    certificate: Pem


@dataclass(frozen=True)
class Fetch:
    """Ask for ``limit`` bytes of a blob from ``offset``. Answered by Chunk."""

    seq: Count
    ack: Count
    sha256: Sha256
    offset: Count
    limit: Annotated[int, Field(ge=1, le=1 << 20)]


@dataclass(frozen=True)
class NextRound:
    """Ask for work: "I hold everything up to round ``after``". Answered by RoundOpen or Finished, when it is time."""

    seq: Count
    ack: Count
    after: Index


@dataclass(frozen=True)
class Echo:
    """Measure the link: ``data`` is of no meaning, and ``want`` such bytes come back. Answered by Echoed."""

    seq: Count
    ack: Count
    data: Tensor
    want: Annotated[int, Field(ge=0, le=MAX_ECHO_BYTES)]


@dataclass(frozen=True)
class AskHeld:
    """Which of these released activations does the server hold? Answered by Held, in their order."""

    seq: Count
    ack: Count
    records: tuple[RecordName, ...]


@dataclass(frozen=True)
class Release:
    """Activations (B, T, D) of ``records``, once for all epochs: the server keeps them. Answered by Held.

    What it has no room for it keeps until the Forward that names it.
    """

    seq: Count
    ack: Count
    records: tuple[RecordName, ...]
    hidden: Tensor


@dataclass(frozen=True)
class Countersign:
    """The client's ledger has ``rows`` rows and its chain ends in ``head``. Answered by Countersigned."""

    seq: Count
    ack: Count
    rows: Count
    head: Key


@dataclass(frozen=True)
class Forward:
    """Hidden states (B, T, D) into the trunk. ``lengths`` (B) of right-padded rows; empty when none is padded.

    ``label_tokens`` is how many label tokens the summed loss of this micro-batch has. With ``train`` the server
    keeps the graph for the Backward that follows. Instead of ``hidden`` it may name ``records`` that were released.
    Answered by Hidden, StepMissed, or Missing for records that the server does not hold.
    """

    seq: Count
    ack: Count
    round: Index
    step: Count
    micro: Count
    train: bool
    label_tokens: Count
    lengths: tuple[Count, ...]
    hidden: Tensor | None = None
    records: tuple[RecordName, ...] = ()


@dataclass(frozen=True)
class Backward:
    """Gradient (B, T, D) of the *summed* label-token loss at the trunk's output. Answered by Gradient or StepMissed."""

    seq: Count
    ack: Count
    round: Index
    step: Count
    micro: Count
    gradient: Tensor


@dataclass(frozen=True)
class SitOut:
    """This client drops out of the step (its numbers were not finite). Answered by StepMissed."""

    seq: Count
    ack: Count
    round: Index
    step: Count


@dataclass(frozen=True)
class Upload:
    """A piece of a blob that an Update will name. Answered by Uploaded."""

    seq: Count
    ack: Count
    sha256: Sha256
    offset: Count
    total: Count
    data: Tensor


@dataclass(frozen=True)
class Update:
    """This client's weights after a round, as the uploaded blob ``sha256`` ("" when it shares none).

    ``tokens`` label tokens weigh it in the merge. ``held_out_loss``, if it is shared, is what the client measured at
    the round's start, in nats a token. Answered by RoundDurable, once the merge is on disk, or at once when the
    round was merged without it.
    """

    seq: Count
    ack: Count
    round: Index
    tokens: Count
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    held_out_loss: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None


@dataclass(frozen=True)
class Bye:
    """The client leaves; the server forgets its session."""

    seq: Count
    ack: Count
    reason: Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Chunk:
    """``data`` of a blob from ``offset``; ``total`` is the blob's length in bytes."""

    seq: Count
    sha256: Sha256
    offset: Count
    total: Count
    data: Tensor


@dataclass(frozen=True)
class RoundOpen:
    """Train ``round`` from the weights of the list ``weights`` ("" = the base model's)."""

    seq: Count
    round: Index
    weights: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


@dataclass(frozen=True)
class Finished:
    """The federation has ended after ``round``; ``weights`` lists its merged tensors."""

    seq: Count
    round: Index
    weights: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


@dataclass(frozen=True)
class Echoed:
    """As many bytes as were wanted, of no meaning."""

    seq: Count
    data: Tensor


@dataclass(frozen=True)
class Held:
    """Which of the records the server holds, in the order in which they were named."""

    seq: Count
    held: tuple[bool, ...]


@dataclass(frozen=True)
class Missing:
    """The Forward named ``records`` that the server does not hold (or waits behind one): release them, then repeat
    it, and those after it, in order."""

    seq: Count
    round: Index
    step: Count
    micro: Count
    records: tuple[RecordName, ...]


@dataclass(frozen=True)
class Countersigned:
    """The server has written down rows and head of this client's ledger, and signs them."""

    seq: Count
    rows: Count
    head: Key
    signature: Signature


@dataclass(frozen=True)
class Hidden:
    """The trunk's output (B, T, D) for a Forward."""

    seq: Count
    round: Index
    step: Count
    micro: Count
    hidden: Tensor


@dataclass(frozen=True)
class Gradient:
    """Gradient (B, T, D) at the trunk's input, or None when nothing below it trains."""

    seq: Count
    round: Index
    step: Count
    micro: Count
    gradient: Tensor | None = None


@dataclass(frozen=True)
class StepMissed:
    """This client was dropped from the step: discard its gradients and go on with the next one."""

    seq: Count
    round: Index
    step: Count


@dataclass(frozen=True)
class Uploaded:
    """The server holds ``received`` bytes of the blob."""

    seq: Count
    sha256: Sha256
    received: Count


@dataclass(frozen=True)
class RoundDurable:
    """Merged, and on the server's disk; ``weights`` lists the merged tensors. The client may now forget older rounds.

    ``merged`` is False when this client's update came too late and is not in it.
    """

    seq: Count
    round: Index
    weights: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    merged: bool


@dataclass(frozen=True)
class Farewell:
    """The answer to Bye."""

    seq: Count


@dataclass(frozen=True)
class Failed:
    """The request was understood and refused; the session goes on. ``field`` names what was wrong with it."""

    seq: Count
    code: ErrorCode
    reason: Text
    remedy: Text = ""
    field: Annotated[str, Field(max_length=64)] = ""


Request = (
    Fetch | NextRound | Echo | AskHeld | Release | Countersign | Forward | Backward | SitOut | Upload | Update | Bye
)
Answer = (
    Chunk
    | RoundOpen
    | Finished
    | Echoed
    | Held
    | Missing
    | Countersigned
    | Hidden
    | Gradient
    | StepMissed
    | Uploaded
    | RoundDurable
    | Farewell
    | Failed
)
Enrolment = AskAuthority | Authority | Enrol | Enrolled
Message = Hello | Welcome | Refused | Enrolment | Request | Answer

REQUESTS: tuple[type, ...] = get_args(Request)
ANSWERS: tuple[type, ...] = get_args(Answer)

#: the name on the wire -> the class; the names are a contract (docs/protocol.md)
MESSAGE_TYPES: dict[str, type] = {
    "hello": Hello,
    "welcome": Welcome,
    "refused": Refused,
    "ask_authority": AskAuthority,
    "authority": Authority,
    "enrol": Enrol,
    "enrolled": Enrolled,
    "fetch": Fetch,
    "next_round": NextRound,
    "echo": Echo,
    "ask_held": AskHeld,
    "release": Release,
    "countersign": Countersign,
    "forward": Forward,
    "backward": Backward,
    "sit_out": SitOut,
    "upload": Upload,
    "update": Update,
    "bye": Bye,
    "chunk": Chunk,
    "round_open": RoundOpen,
    "finished": Finished,
    "echoed": Echoed,
    "held": Held,
    "missing": Missing,
    "countersigned": Countersigned,
    "hidden": Hidden,
    "gradient": Gradient,
    "step_missed": StepMissed,
    "uploaded": Uploaded,
    "round_durable": RoundDurable,
    "farewell": Farewell,
    "failed": Failed,
}
TYPE_NAMES = {cls: name for name, cls in MESSAGE_TYPES.items()}
