"""A byte-level BPE tokenizer trained on given texts, for models that start from random weights.

Byte-level, so that no text is unknown and decoding gives back the text exactly. Only ever train it on public
text: a vocabulary is a release of its corpus (merges spell out frequent words), and it goes to every client.
A federation that starts from a published checkpoint uses that checkpoint's tokenizer and none of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from splitfl.errors import DataError

PAD_TOKEN = "<|pad|>"
"""Id 0. Not the end of text, so that a mask over padding never hides an end that must be learned."""

END_OF_TEXT = "<|endoftext|>"
"""Id 1. Both bos and eos, as in GPT-2 and GPT-NeoX. Encoding does not add it by itself."""

MIN_VOCAB = 300
"""256 bytes, two special tokens, and some merges: below this there is nothing to train."""


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of ``vocab`` tokens on ``texts``, which are streamed and may be one long generator.

    The same texts give the same tokenizer in every process. ``len(tokenizer)`` is ``vocab`` where the texts
    hold enough distinct words, and less where they do not: size the model by it. Padding goes on the right.

    Raises :class:`DataError` if ``vocab`` is below 300, no text holds more than white space, or one holds
    half a surrogate pair.
    """
    if vocab < MIN_VOCAB:
        raise DataError(
            f"a vocabulary of {vocab} is too small for a byte-level tokenizer",
            f"Ask for at least {MIN_VOCAB}",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    try:
        tokenizer.train_from_iterator(_usable(texts), _trainer(vocab))
    except UnicodeEncodeError as error:
        raise DataError(
            "a text of the corpus holds half a surrogate pair, which is not a character",
            r"Look for a lone \ud800 to \udfff escape, and repair or drop it",
        ) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD_TOKEN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _trainer(vocab: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD_TOKEN, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _usable(texts: Iterable[str]) -> Iterator[str]:
    """The texts that hold something; raises once they end if none did."""
    found = False
    for text in texts:
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError("the corpus holds no text to train a tokenizer on", "Name files that are not empty")
