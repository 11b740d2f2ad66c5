"""What a server says it offers, checked: nothing of it is trusted but what a hash proves.

A list names files and tensors by the SHA-256 of their bytes. Hashes become file names here, so their form is checked
before anything is done with them; sizes bound what a download may take.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from splitfl.errors import ProtocolError
from splitfl.split.export import COPIED_FILES
from splitfl.wire.messages import Count, Sha256

MAX_LIST_BYTES = 64 << 20
MAX_FILE_BYTES = 512 << 20  # the largest is a narrow release: two square matrices as wide as the model
ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MODEL_FILES = frozenset({"config.json", *COPIED_FILES})


class Offer(BaseModel):
    """Base: strict, and nothing beside the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class OfferedFile(Offer):
    """A small file of the model folder; ``nbytes`` long."""

    sha256: Sha256
    nbytes: int = Field(ge=0, le=MAX_FILE_BYTES)


class OfferedTensor(Offer):
    """A tensor as safetensors stores it: row-major, little-endian, ``nbytes`` long."""

    sha256: Sha256
    dtype: Literal["F32", "F16", "BF16"]
    shape: tuple[Count, ...] = Field(max_length=8)
    nbytes: Count

    @model_validator(mode="after")
    def bytes_fit(self) -> OfferedTensor:
        if self.nbytes != ELEMENT_BYTES[self.dtype] * math.prod(self.shape):
            raise ValueError("its bytes do not fit its shape")
        return self


class Manifest(Offer):
    """All that a client may fetch of the base model."""

    files: dict[str, OfferedFile]
    tensors: dict[str, OfferedTensor]

    @model_validator(mode="after")
    def files_are_a_models(self) -> Manifest:
        if not self.files.keys() <= MODEL_FILES:
            raise ValueError("it offers a file that no model folder has")
        return self


Weights = TypeAdapter(dict[str, OfferedTensor])


def read_manifest(data: bytes) -> Manifest:
    """The list of the base model's parts. Raises ProtocolError."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise malformed(error) from error


def read_weights(data: bytes) -> dict[str, OfferedTensor]:
    """A list of merged tensors. Raises ProtocolError."""
    try:
        return Weights.validate_json(data, strict=True)
    except ValidationError as error:
        raise malformed(error) from error


def malformed(error: ValidationError) -> ProtocolError:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:80]
    return ProtocolError(f"the server's list of tensors is malformed: {place}: {first['msg']}", "Tell its operator.")
