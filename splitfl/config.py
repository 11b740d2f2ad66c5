"""The federation's settings: ``federation.toml`` -> frozen, checked once, handed to every client at Welcome.

The server's settings win, so no flag has to match by hand on two machines. Every field says its unit.
"""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from splitfl.cut import Cut
from splitfl.errors import ConfigError

Line = Annotated[str, Field(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]  # what people are shown, on one line


class Section(BaseModel):
    """Base of the tables: frozen; a field that does not exist is an error, and so is an infinite number.

    TOML can write ``inf``, the JSON that clients receive cannot. ``true`` and ``"3"`` are no numbers. Fields with
    ``strict=False`` are those whose type TOML does not have: an array becomes a tuple, a text a path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


S = TypeVar("S", bound=Section)


class Rounds(Section):
    """How the federation goes on."""

    count: int = Field(3, ge=1, description="rounds until the federation ends")
    local_steps: int = Field(10, ge=1, description="optimizer steps of each client in a round")
    client_fraction: float = Field(1.0, gt=0, le=1, description="share of the waiting clients that a round takes")
    min_clients: int = Field(1, ge=1, description="clients that a round needs to open, and the least that it takes")
    deadline_s: float = Field(
        0.0,
        ge=0,
        description="seconds until a round merges what it has (unless merge.aggregate is the mean, min_clients updates "
        "at least) or goes on without whom a step waits for, and that min_clients wait for others between rounds; "
        "0 = wait for all",
    )
    staleness: Literal["drop", "polynomial"] = Field(
        "drop",
        description="what becomes of an update that missed its round's deadline; drop: nothing; polynomial: the next "
        "merge takes its change, weighted by label tokens times (1 + rounds late) ^ -staleness_exponent",
    )
    staleness_exponent: float = Field(
        0.5, ge=0, le=100, description="polynomial: how fast late updates lose weight, no unit; 0 = not at all"
    )
    max_staleness: int = Field(2, ge=1, le=2, description="polynomial: rounds that an update may be late; beyond, drop")


class Batch(Section):
    """What one step of one client sees."""

    records: int = Field(8, ge=1, description="records (sequences) in a step")
    micro_batches: int = Field(1, ge=1, description="pieces that a step is computed in; divides records")
    in_flight: int = Field(
        2,
        ge=1,
        le=32,
        description="micro-batches of a client that wait for the trunk's output at once; one less than that may wait "
        "for its gradients; 1 = one after another, as always with privacy.dp_sgd",
    )
    max_length: int = Field(256, ge=2, description="tokens in a record, at most")
    pack: bool | None = Field(
        None,
        description="true: rows fill blocks of max_length tokens and are cut there; false: one row a record; "
        "none = true with privacy off, false else",
    )
    buckets: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        strict=False,
        description="tokens; with privacy on a record is padded to the next of these public lengths; "
        "none = powers of two from 32 to max_length",
    )

    @model_validator(mode="after")
    def pieces_are_equal(self) -> Batch:
        if self.records % self.micro_batches:
            raise ValueError(f"micro_batches = {self.micro_batches} does not divide records = {self.records}")
        if self.buckets and (sorted(set(self.buckets)) != list(self.buckets) or self.buckets[-1] != self.max_length):
            raise ValueError(f"buckets must rise and end at max_length = {self.max_length}")
        return self

    @property
    def padded_lengths(self) -> tuple[int, ...]:
        """The public lengths to which records are padded with privacy on, in tokens, shortest first."""
        powers = (2**exponent for exponent in range(5, 64))
        below = itertools.takewhile(lambda length: length < self.max_length, powers)
        return self.buckets or (*below, self.max_length)


class Model(Section):
    """Where the model is cut and what of it trains."""

    n_bottom: int = Field(1, ge=0, description="first blocks on a client, unless its plan says otherwise")
    n_top: int = Field(1, ge=0, description="last blocks on a client, unless its plan says otherwise")
    min_bottom: int | None = Field(None, ge=0, description="blocks a plan must keep at the bottom; none = n_bottom")
    max_bottom: int | None = Field(None, ge=0, description="blocks a plan may keep at the bottom; none = n_bottom")
    min_top: int | None = Field(None, ge=0, description="blocks a plan must keep at the top; none = n_top")
    max_top: int | None = Field(None, ge=0, description="blocks a plan may keep at the top; none = n_top")
    freeze_below: int | None = Field(
        None, ge=0, description="embedding and blocks below this number are frozen for everyone; none = max_bottom"
    )
    train: Literal["full", "lora"] = Field("full", description="how the other blocks train")
    head: Literal["full", "lora", "frozen"] = Field("full", description="how final norm and output head train")
    lora_rank: int = Field(8, ge=1, description="rank of LoRA's factors")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA's scale times its rank")
    compute: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="arithmetic; auto = bf16 autocast on a GPU, fp32 on a CPU"
    )


class Optimizer(Section):
    """How weights move: the trunk's, and the clients' unless the two fields of their own say otherwise."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="optimizer of the trunk, and of the clients")
    learning_rate: float = Field(5e-4, gt=0, description="peak step size of the trunk, and of the clients")
    client_name: Literal["adamw", "sgd"] | None = Field(
        None, description="optimizer of the clients' own weights in rounds; none = name. Baselines move by name"
    )
    client_learning_rate: float | None = Field(
        None, gt=0, description="their peak step size, on the same schedule; none = learning_rate"
    )
    schedule: Literal["cosine", "constant"] = Field("cosine", description="how the step size falls after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    final_fraction: float = Field(0.1, ge=0, le=1, description="share of the peak step size at the last step")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for AdamW, L2 for SGD; times each holder's step size")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="L2 norm to which bottom, trunk and top are clipped; 0 = off")

    @model_validator(mode="after")
    def client_has_its_own_step_size(self) -> Optimizer:
        if self.of_clients != self.name and self.client_learning_rate is None:
            raise ValueError(
                f'client_name = "{self.client_name}" needs client_learning_rate: '
                f'steps of "{self.name}" and "{self.client_name}" are not of one size'
            )
        return self

    @property
    def of_clients(self) -> Literal["adamw", "sgd"]:
        """The optimizer of the clients' own weights."""
        return self.client_name or self.name

    @property
    def rate_of_clients(self) -> float:
        """The peak step size of the clients' own weights."""
        return self.client_learning_rate or self.learning_rate


class Merge(Section):
    """What is merged and how."""

    strategy: str = Field(
        "fedavg",
        description="how a round's average becomes the next weights: fedavg, fedprox, scaffold, fedavgm, fedadagrad, "
        "fedyogi or fedadam",
    )
    share: Literal["top", "ends", "none"] = Field(
        "ends", description="client weights that are merged: the top's, both ends', or none (personal heads)"
    )
    server_learning_rate: float | None = Field(
        None,
        gt=0,
        description="step size of the server; none = 1.0 (scaffold, fedavgm), 0.01 (fedadagrad, fedyogi, fedadam)",
    )
    server_momentum: float = Field(
        0.9, ge=0, lt=1, description="fedavgm, fedyogi, fedadam: decay of the mean update over rounds, no unit"
    )
    server_beta2: float = Field(
        0.99, ge=0, lt=1, description="fedyogi, fedadam: decay of the mean squared update over rounds, no unit"
    )
    server_epsilon: float = Field(
        1e-3, gt=0, description="fedadagrad, fedyogi, fedadam: tau, added to the root of the mean squared update"
    )
    proximal_mu: float = Field(
        0.01, ge=0, description="fedprox: pull towards the round's start, times the clients' step size"
    )
    aggregate: Literal["mean", "median", "trimmed_mean", "krum"] = Field(
        "mean",
        description="a round's average: mean weighted by label tokens (scaffold: each client once), or robust: "
        "coordinate median, trimmed mean, or Krum's one update",
    )
    trim_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="trimmed_mean: share of the copies that is cut off at each end, rounded up"
    )
    byzantine: int = Field(1, ge=0, description="krum: clients that may lie; a round needs 2 x byzantine + 3")
    clip_norm: float = Field(0.0, ge=0, description="L2 norm to which a client's whole update is clipped; 0 = off")


class TrunkSettings(Section):
    """How the trunk serves its clients."""

    mode: Literal["client-batch", "sequential"] = Field(
        "client-batch", description="client-batch: one joint step; sequential: one step a client, in turn"
    )
    step_deadline_s: float = Field(0.0, ge=0, description="seconds a step waits for a client; 0 = while it is alive")
    grace_s: float = Field(120.0, ge=0, description="seconds that a session outlives its connection")
    cache_gib: float = Field(8.0, ge=0, description="GiB of disk for released activations; the rest is sent each epoch")
    max_tokens_in_flight: int = Field(262_144, ge=1, description="tokens whose graphs the trunk holds at once")
    recompute: bool = Field(
        False,
        description="true: the trunk keeps no graph while clients compute, and runs each forward again in its "
        "backward: a third more arithmetic, and room for hundreds of clients",
    )
    gradient_clip_norm: float = Field(
        0.0,
        ge=0,
        description="L2 norm, over a record's summed loss, to which the server clips its gradient into the trunk; "
        "0 = off",
    )


#: number formats of the link, from the most exact to the coarsest
CODEC_NAMES = ("fp32", "fp16", "bf16", "int8")


class Wire(Section):
    """What crosses the link."""

    codec: Literal["bf16", "fp16", "fp32", "int8"] = Field(
        "bf16", description="number format of activations and gradients, unless a client's plan says otherwise"
    )
    coarsest: Literal["fp32", "fp16", "bf16", "int8"] | None = Field(
        None,
        description="coarsest number format that a client's plan may choose where its link is slow; none = int8, "
        'or fp32 where codec = "fp32"',
    )

    @property
    def codecs(self) -> tuple[str, ...]:
        """What a plan may choose from, the federation's own first."""
        coarsest = self.coarsest or ("fp32" if self.codec == "fp32" else "int8")
        first, last = CODEC_NAMES.index(self.codec), CODEC_NAMES.index(coarsest)
        return CODEC_NAMES[first : last + 1]

    @model_validator(mode="after")
    def some_codec_is_left(self) -> Wire:
        if not self.codecs:
            raise ValueError(f"coarsest = {self.coarsest!r} is finer than codec = {self.codec!r}")
        return self


class Evaluation(Section):
    """What a client measures on its own held-out rows; losses stay at home unless ``share_metrics``."""

    held_out_fraction: float = Field(0.1, ge=0, lt=1, description="share of the rows that is never trained on")
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="draws the held-out rows; apart from `seed`, so that seeds compare; no unit"
    )
    records: int = Field(
        64, ge=0, description="held-out records that pass the trunk, at most, spread over all of them; 0 = none"
    )
    every_rounds: int = Field(1, ge=0, description="rounds between evaluations; 0 = before and after training alone")
    share_metrics: bool = Field(
        False,
        description="whether clients tell the server their held-out loss with each update, clipped and, with privacy "
        "on, noised",
    )
    baselines: Literal["auto", "none", "ends", "all"] = Field(
        "auto",
        description="what each client trains beside the federation's result, after the last round: its ends without "
        "the trunk, and its top alone; auto = all with privacy on, none else",
    )


class Agreement(Section):
    """What people agree to before anything computed from their data leaves; shown at the first join."""

    owner: Line = Field("", description="who answers for the federation, no unit")
    contact: Line = Field("", description="whom to ask, no unit")
    purpose: Line = Field("", description="what the model is for, no unit")
    exporters: tuple[Line, ...] = Field(
        ("operator",), strict=False, description="who may export the trained model, no unit"
    )


#: what may leave a client, as terms and floors name it
LEAVING = ("activations", "gradients", "weights", "losses")

#: named levels of mode "measured": sigma of the activations' noise, in clip norms
LEVELS = {"light": 0.1, "medium": 0.3, "strong": 1.0}


class ReleaseSettings(Section):
    """How narrow what is released is. Without a rank it is as wide as the model."""

    rank: int | None = Field(
        None,
        ge=1,
        description="numbers a token that are released, through the encoder that `splitfl adapt` put beside the "
        "model; none = the bottom's output as it is",
    )


class Privacy(Section):
    """What the server may learn. ``off``: it can read the text."""

    mode: Literal["off", "measured", "certified"] = Field(
        "off",
        description="off: activations travel as they are; measured: noised, no guarantee, audited; certified: "
        "noised so that epsilon holds",
    )
    level: Literal["light", "medium", "strong"] = Field(
        "medium", description="measured: the activations' noise, 0.1, 0.3 or 1.0 clip norms"
    )
    epsilon: float | None = Field(
        None, gt=0, description="certified: bound on all that leaves of one unit, no unit; none = not certified"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="probability that goes with epsilon; below 1 / records")
    unit: Literal["record", "client"] = Field(
        "record", description="what epsilon hides: one record, or all of a client"
    )
    clip: Literal["token", "record"] = Field(
        "token", description="what of an activation is clipped: each token, or all"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="L2 norm to which activations are clipped; none = measured by the server on public text"
    )
    noise_multiplier: float | None = Field(
        None, gt=0, description="measured: the activations' noise in clip norms, instead of a level"
    )
    gradients: Literal["none", "noised"] = Field(
        "none", description="gradients into the trunk: none (the trunk stays as published), or clipped and noised"
    )
    gradient_clip_norm: float = Field(1.0, gt=0, description="L2 norm to which a record's gradient is clipped")
    gradient_noise_multiplier: float = Field(
        0.02, gt=0, description="measured: the gradients' noise in gradient_clip_norms"
    )
    dp_sgd: bool = Field(False, description="whether the client's own weights are trained with DP-SGD")
    dp_max_grad_norm: float = Field(1.0, gt=0, description="DP-SGD: L2 norm of a record's own gradient, at most")
    dp_noise_multiplier: float = Field(1.0, gt=0, description="measured: DP-SGD's noise in dp_max_grad_norms")
    metric_noise_multiplier: float = Field(
        1.0, gt=0, description="measured: the noise of a shared held-out loss, in what one record can change it by"
    )
    audit_records: int = Field(
        24, ge=0, description="records of which a client keeps every release, encrypted, for `splitfl audit`"
    )

    @property
    def on(self) -> bool:
        """Whether noise is added."""
        return self.mode != "off"

    @model_validator(mode="after")
    def target_and_mode_agree(self) -> Privacy:
        if (self.mode == "certified") != (self.epsilon is not None):
            raise ValueError('epsilon belongs to mode = "certified", and that mode needs one')
        if self.mode != "measured" and self.noise_multiplier is not None:
            raise ValueError(
                'noise_multiplier belongs to mode = "measured"; "certified" computes its noise from epsilon'
            )
        return self


class Federation(Section):
    """Everything a federation agrees on."""

    name: str = Field("federation", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="its name, no unit")
    seed: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="with each client's name: data order; alone: cohorts and LoRA's start; no unit",
    )
    rounds: Rounds = Rounds()
    batch: Batch = Batch()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    merge: Merge = Merge()
    trunk: TrunkSettings = TrunkSettings()
    wire: Wire = Wire()
    evaluation: Evaluation = Evaluation()
    release: ReleaseSettings = ReleaseSettings()
    privacy: Privacy = Privacy()
    agreement: Agreement = Agreement()

    @property
    def packs(self) -> bool:
        """Whether rows are laid end to end; with privacy on a record is the unit of privacy, so never."""
        return not self.privacy.on if self.batch.pack is None else self.batch.pack

    @property
    def trains_trunk(self) -> bool:
        """Whether gradients go into the trunk."""
        return not self.privacy.on or self.privacy.gradients != "none"

    @property
    def cut(self) -> Cut:
        """The cut of a client that does not plan its own."""
        return Cut(self.model.n_bottom, self.model.n_top)

    @property
    def bottoms(self) -> range:
        """How many blocks a client may keep at the bottom."""
        low, high = self.model.min_bottom, self.model.max_bottom
        default = self.model.n_bottom
        return range(default if low is None else low, (default if high is None else high) + 1)

    @property
    def tops(self) -> range:
        """How many blocks a client may keep at the top."""
        low, high = self.model.min_top, self.model.max_top
        default = self.model.n_top
        return range(default if low is None else low, (default if high is None else high) + 1)

    @property
    def freeze_below(self) -> int:
        """The embedding and the blocks below this number are frozen for everyone."""
        chosen = self.model.freeze_below
        return self.bottoms[-1] if chosen is None else chosen

    @property
    def baselines(self) -> Literal["none", "ends", "all"]:
        """What each client trains beside the federation's result."""
        chosen = self.evaluation.baselines
        if chosen == "auto":
            return "all" if self.privacy.on else "none"
        return chosen

    @property
    def alone(self) -> Federation:
        """For models that are trained without merging, beside the federation: without a strategy, and where the clients
        have another optimizer than the trunk, everything by the trunk's: theirs belongs to the strategy."""
        same = self.optimizer.of_clients == self.optimizer.name
        own = {} if same else {"client_name": None, "client_learning_rate": None}
        optimizer = self.optimizer.model_copy(update=own)
        return self.model_copy(update={"optimizer": optimizer, "merge": Merge(share=self.merge.share)})

    def allows(self, cut: Cut) -> bool:
        """Whether a client may take ``cut``."""
        return cut.n_bottom in self.bottoms and cut.n_top in self.tops

    @model_validator(mode="after")
    def cuts_can_be_merged(self) -> Federation:
        if not self.bottoms or not self.tops:
            raise ValueError("model: a minimum is above its maximum")
        if not self.allows(self.cut):
            raise ValueError(f"model: the default cut {self.cut} is outside its own limits")
        if self.merge.share == "none" and len(self.tops) > 1:
            raise ValueError('merge.share = "none" needs one n_top for all: personal tops of different depth')
        return self

    @model_validator(mode="after")
    def privacy_can_be_had(self) -> Federation:
        privacy, shares = self.privacy, self.merge.share != "none"
        if self.release.rank is not None and (not privacy.on or len(self.bottoms) * len(self.tops) != 1):
            raise ValueError("release.rank needs privacy on, and one cut for all: that of the model's narrow release")
        if privacy.on and self.batch.pack:
            raise ValueError("batch.pack = true lays several records end to end: with privacy on, leave it out")
        if privacy.mode != "certified":
            return self
        embedding_trains = self.freeze_below == 0 and self.model.train == "full"
        if self.freeze_below < self.bottoms[-1] or embedding_trains:
            raise ValueError(
                "a bottom that trains sends each record anew: with mode = certified, set model.freeze_below"
            )
        if privacy.gradients != "none" and not privacy.dp_sgd:
            raise ValueError("gradients of a top trained without DP tell of every record: set privacy.dp_sgd = true")
        if shares and not privacy.dp_sgd:
            raise ValueError(
                'weights trained without DP have no epsilon: set privacy.dp_sgd = true or merge.share = "none"'
            )
        return self

    def check_layers(self, layers: int) -> None:
        """Raise ConfigError when the model has too few blocks for any allowed cut."""
        Cut(self.bottoms[0], self.tops[0]).check(layers)
        self.cut.check(layers)
        if max(self.bottoms[-1], self.tops[-1]) > layers:
            raise ConfigError(
                f"max_bottom = {self.bottoms[-1]} or max_top = {self.tops[-1]} is above the model's {layers} blocks",
                "Lower model.max_bottom or model.max_top.",
            )
        if self.freeze_below > layers:
            raise ConfigError(
                f"freeze_below = {self.freeze_below} but the model has {layers} blocks", "Lower model.freeze_below."
            )


def load_federation(path: Path | None) -> Federation:
    """Read ``federation.toml``; None gives the defaults. Raises ConfigError that names the field."""
    return Federation() if path is None else parse_federation(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "Name an existing TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", "Mend that line.") from error


def parse_federation(table: object, where: str) -> Federation:
    """Check a table of settings. ``where`` names its source in errors. Raises ConfigError."""
    return parse_section(Federation, table, where, "docs/federation.md")


def parse_section(section: type[S], table: object, where: str, page: str) -> S:
    """Check a table of settings; ``page`` is the documentation that lists its fields. Raises ConfigError."""
    try:
        return section.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{where}: {field}: {text}" if field else f"{where}: {text}", f"{page} lists every field with its unit."
        ) from error
