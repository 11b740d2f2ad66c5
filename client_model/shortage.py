"""When memory runs out: telling such an error from every other, and what the client then does.

It goes back to where its journal begins, as after a crash but in the same process, and computes each micro-batch in
twice as many pieces. What was sent is answered from the journal, so no data is lost and nothing leaves twice.
"""

from __future__ import annotations

import torch

from splitfl.errors import SplitFLError

ALLOCATOR_SAYS = ("not enough memory", "can't allocate memory", "Cannot allocate memory")  # c10's CPU allocator


class ShortageError(SplitFLError):
    """Memory ran out in the middle of a round; the next start goes on in it, with smaller pieces."""


def is_shortage(error: BaseException) -> bool:
    """Whether ``error`` says that there was no memory: Python's own, the GPU's, or torch's allocator on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATOR_SAYS)
