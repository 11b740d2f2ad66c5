"""From an example to the token ids a model sees, and to which of them carry loss.

Text carries loss everywhere, a prompt none and its response all, a conversation on the assistant's turns
alone. The turns are found by the prefix method: the conversation is rendered up to each turn and must be a
prefix of the whole. A chat template that rewrites earlier turns (dropping old reasoning, say) fails this and
is refused, for the model would be trained on tokens that it never sees when it is used.

A record is one sequence, the unit of privacy; its labels are already shifted, so that nothing downstream
shifts again. Rows become records in ``packing.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from splitfl.data.examples import Example
from splitfl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Message = dict[str, str]

IGNORE = -100
"""The label of a position whose prediction carries no loss; PyTorch's ``ignore_index``."""

# Llama 3.2 and gpt-oss write today's date into the prompt: records, and with them their budgets, would change
# overnight. This shadows the clock that transformers gives to templates; its line end is taken off by trim_blocks.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%Y', '2024') }}{% endmacro %}\n"
)


class Encoded(NamedTuple):
    """A row as tokens: ``ids`` int64 (T,), and ``loss_mask`` bool (T,), true at the tokens to be learned."""

    ids: IntArray
    loss_mask: BoolArray


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """One training sequence. ``labels[t]`` is the token that position t must predict, or ``IGNORE``.

    Both are int64 (T,); the last label is always ``IGNORE``.
    """

    input_ids: IntArray
    labels: IntArray

    @classmethod
    def from_encoded(cls, encoded: Encoded) -> Record:
        """Shift the tokens that carry loss one to the left, onto the positions that predict them."""
        labels = np.full(len(encoded.ids), IGNORE, np.int64)
        labels[:-1] = np.where(encoded.loss_mask[1:], encoded.ids[1:], IGNORE)
        return cls(encoded.ids, labels)

    @property
    def label_tokens(self) -> int:
        """How many positions carry loss."""
        return int(np.count_nonzero(self.labels != IGNORE))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"Record({len(self)} tokens, {self.label_tokens} with loss)"


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Encoded:
    """Tokenise one example, end it with the end-of-sequence token, cut it on the right to ``max_length``.

    A beginning-of-sequence token stands in front where the tokenizer adds one itself, and never twice.
    Raises ``DataError`` for a tokenizer without an end-of-sequence token, and for a conversation whose chat
    template is missing, refuses it, or is not prefix-stable.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-sequence token", "Set eos_token in its tokenizer_config.json")
    if example.messages:
        ids, loss_mask = _encode_messages(example.messages, tokenizer)
    elif example.prompt is not None and example.response is not None:
        ids, loss_mask = _encode_pair(example.prompt, example.response, tokenizer)
    else:
        ids = _ended(_with_special_tokens(example.text or "", tokenizer), tokenizer)
        loss_mask = np.ones(len(ids), np.bool_)
    return Encoded(ids[:max_length], loss_mask[:max_length])


def _encode_pair(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Apart, then joined: the prompt's tokens are then those that the model is given when it must answer."""
    before = _with_special_tokens(prompt, tokenizer)
    after = _ended(_tokens(response, tokenizer), tokenizer)
    return Encoded(np.concatenate([before, after]), np.arange(len(before) + len(after)) >= len(before))


def _encode_messages(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    if not turns:  # an opening by the assistant is no answer: it is context, without loss
        ids = _tokens(_render(messages, tokenizer), tokenizer)
        return Encoded(ids, np.zeros(len(ids), np.bool_))
    messages = messages[: turns[-1] + 1]  # what follows the last assistant turn carries no loss
    whole = _render(messages, tokenizer)
    ids = _tokens(whole, tokenizer)
    loss_mask = np.zeros(len(ids), np.bool_)
    start = 0
    for turn in turns:
        start, end = _turn_span(messages, turn, whole, ids, tokenizer)
        loss_mask[start:end] = True
    if tokenizer.eos_token_id in ids[start:]:  # nearly every template ends its turns with it
        return Encoded(ids, loss_mask)
    return Encoded(np.append(ids, tokenizer.eos_token_id), np.append(loss_mask, True))


def _turn_span(
    messages: Sequence[Message], turn: int, whole: str, ids: IntArray, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """The tokens of one assistant turn: what is added to the prompt that the model is given at that turn."""
    before = _render(messages[:turn], tokenizer, ask=True)
    after = _render(messages[: turn + 1], tokenizer)
    if not (after.startswith(before) and whole.startswith(after)):
        raise DataError(
            "The chat template is not prefix-stable: it rewrites earlier turns once later ones follow",
            "Use a template that only appends, or give the data as prompt and response",
        )
    # Compared as tokens, since one token may reach across the end of the prefix.
    return _common_prefix(_tokens(before, tokenizer), ids), _common_prefix(_tokens(after, tokenizer), ids)


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "The data hold messages, but the tokenizer has no chat template",
            "Add chat_template.jinja to the model folder, or give the data as prompt and response",
        )
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _FIXED_DATE + template
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=ask,
                chat_template=template,
            )
        )
    except (TemplateError, TypeError, ValueError, LookupError):  # its message may quote the conversation
        raise DataError(
            "The chat template refuses a conversation",
            "Check that roles are those it knows, in the order that it wants",
        ) from None


def _with_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> IntArray:
    """With what the tokenizer puts in front itself, once, and without what it puts behind."""
    ids = _tokens(text, tokenizer, add_special_tokens=True)
    bos = tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]  # the text brought its own
    if len(ids) and ids[-1] == tokenizer.eos_token_id:
        plain = _tokens(text, tokenizer)
        return ids[:-1] if np.array_equal(ids[:-1][-len(plain) :], plain) else ids
    return ids


def _ended(ids: IntArray, tokenizer: PreTrainedTokenizerBase) -> IntArray:
    if len(ids) and ids[-1] == tokenizer.eos_token_id:
        return ids
    return np.append(ids, np.int64(tokenizer.eos_token_id))


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = False) -> IntArray:
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    return np.asarray(encoded["input_ids"], np.int64)


def _common_prefix(prefix: IntArray, ids: IntArray) -> int:
    length = min(len(prefix), len(ids))
    different = np.flatnonzero(prefix[:length] != ids[:length])
    return int(different[0]) if len(different) else length
