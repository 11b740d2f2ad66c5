"""Every error a user can meet, in one tree; each kind has its exit code, and each message says what to do.

    SplitFLError              1   anything of ours that has no better name
    ├── ConfigError           2   a flag, a federation.toml or a plan that cannot be used
    ├── DataError             3   the data file: missing, empty, broken, without text
    ├── CheckpointError       4   the model folder: not a checkpoint, no safetensors, a family that does not split
    ├── LinkError             5   the other side cannot be reached, or went away and stayed away
    ├── ProtocolError         6   bytes that break the protocol: wrong version, over a limit, a shape that lies
    ├── RefusedError          7   the other side understood and said no (name taken, unknown round, ...)
    ├── NumericalError        8   NaN or infinity where there must be none
    ├── StorageError          9   the disk: full, read-only, a damaged state folder
    ├── PrivacyError         10   nothing may leave: terms not accepted, a budget spent, a ledger that went back
    ├── TrustError           11   TLS: the other side is not who it should be, or does not know us
    └── PlanError            12   no plan fits this machine: what is missing, and the nearest that would fit

130 is Ctrl-C (state saved). The table is a contract: docs/errors.md repeats it and tests pin it.
"""

from __future__ import annotations


class SplitFLError(Exception):
    """Root of the tree. ``message`` is one line that names the thing; ``remedy`` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class ConfigError(SplitFLError):
    """A flag, a ``federation.toml`` field or a cut that cannot be used."""

    exit_code = 2


class DataError(SplitFLError):
    """The data file or folder is missing, empty, broken, or holds nothing to train on."""

    exit_code = 3


class CheckpointError(SplitFLError):
    """A model folder that is not a usable Hugging Face checkpoint, or a family that does not split exactly."""

    exit_code = 4


class LinkError(SplitFLError):
    """The other side cannot be reached, or went away and did not come back in time."""

    exit_code = 5


class ProtocolError(SplitFLError):
    """Bytes that break the protocol. ``field`` names the offending header field where there is one."""

    exit_code = 6

    def __init__(self, message: str, remedy: str = "", *, field: str = "") -> None:
        super().__init__(message, remedy)
        self.field = field


class RefusedError(SplitFLError):
    """The other side understood the request and refused it; ``code`` is the wire's enumerated reason."""

    exit_code = 7

    def __init__(self, message: str, remedy: str = "", *, code: str = "refused") -> None:
        super().__init__(message, remedy)
        self.code = code


class NumericalError(SplitFLError):
    """NaN or infinity in activations, gradients or weights."""

    exit_code = 8


class StorageError(SplitFLError):
    """The state folder cannot be written or read back whole."""

    exit_code = 9


class PrivacyError(SplitFLError):
    """Nothing may leave: terms are not accepted, a budget is spent, or the ledger went back."""

    exit_code = 10


class TrustError(SplitFLError):
    """TLS failed for want of trust: a wrong fingerprint, a certificate of another authority, or one out of date."""

    exit_code = 11


class PlanError(SplitFLError):
    """Nothing that the federation allows fits this machine. ``missing``: bytes; 0 where memory is not the cause."""

    exit_code = 12

    def __init__(self, message: str, remedy: str = "", *, missing: int = 0) -> None:
        super().__init__(message, remedy)
        self.missing = missing


INTERRUPTED_EXIT_CODE = 130
