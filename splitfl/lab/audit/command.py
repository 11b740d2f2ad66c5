"""What ``splitfl audit`` does, behind its options: reading folders and files, and handing them to the attacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from client_model.records import open_tokenizer, pad_token
from splitfl.errors import ConfigError, DataError
from splitfl.files import write_file
from splitfl.lab.audit.canaries import canary_exposure, texts_like
from splitfl.lab.audit.kept import load_observed
from splitfl.lab.audit.model import PublicModel, frozen
from splitfl.lab.audit.report import AuditReport
from splitfl.lab.audit.run import Plan, run_audit
from splitfl.lab.audit.texts import public_records, public_texts
from splitfl.privacy.ledger import Ledger
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.segment import Piece

CANDIDATES = 1023  # texts that a canary is ranked among: with itself 2^10, so exposure is at most 10 bits


@dataclass(frozen=True)
class Inputs:
    """Folders and files of one audit; see the command's options."""

    state: Path
    model: Path
    data: Path
    key: Path | None = None
    prior: Path | None = None
    public: Path | None = None
    exported: Path | None = None
    canaries: Path | None = None

    def __post_init__(self) -> None:
        if (self.exported is None) != (self.canaries is None):
            raise ConfigError("--exported and --canaries go together", "Name both, or neither.")


def audit_state(inputs: Inputs, seconds: float, seed: int, *, say: Callable[[str], None]) -> AuditReport:
    """Attack the kept releases of a state folder. Raises ConfigError, CheckpointError, DataError."""
    kept = load_observed(inputs.state, inputs.data, inputs.model, inputs.key)
    tokenizer = open_tokenizer(inputs.model)
    prior = None if inputs.prior is None else CheckpointFolder(inputs.prior)
    return run_audit(
        kept.observed,
        PublicModel(CheckpointFolder(inputs.model), kept.cut, prior),
        kept.mechanism,
        public_records(public_texts(inputs.public), tokenizer, kept.max_length),
        generator=torch.Generator().manual_seed(seed),
        gradient_mechanism=kept.gradient_mechanism,
        updates=kept.updates,
        pad_token_id=pad_token(tokenizer),
        plan=Plan(seconds=seconds),
        say=say,
    )


def remember(state: Path, report: AuditReport) -> None:
    """Leave the worst recovery where the client's own report finds it, with the ledger that it is about."""
    ledger = Ledger(state / "ledger.sqlite")
    worst = report.worst.recovery
    facts = {
        "recovery": worst.value,
        "interval": [worst.low, worst.high],
        "attack": report.worst.name,
        "rows": ledger.count,
        "head": ledger.head.hex(),
    }
    ledger.close()
    write_file(state / "audit.json", json.dumps(facts, indent=2).encode())


def exposures(inputs: Inputs, seed: int) -> dict[str, float]:
    """Exposure in bits of each planted text in the exported model; nothing where none is named."""
    if inputs.exported is None or inputs.canaries is None:
        return {}
    planted = read_lines(inputs.canaries)
    source, tokenizer = CheckpointFolder(inputs.exported), open_tokenizer(inputs.exported)
    whole = frozen(source, Piece(0, source.config.num_hidden_layers, embedding=True, head=True))
    generator = torch.Generator().manual_seed(seed)

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)

    return {
        text: canary_exposure(
            whole, [encode(text)], [encode(other) for other in texts_like(text, CANDIDATES, generator)]
        )[0]
        for text in planted
    }


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that hold something. Raises DataError."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "Name a UTF-8 text file with a canary in each line."
        ) from error
