"""The tokenizer loses nothing, comes out the same every time, and keeps its promises about ids and sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from splitfl.data.tokenizer import END_OF_TEXT, PAD_TOKEN, train_tokenizer
from splitfl.errors import DataError

WORDS = ["patient", "fever", "pulse", "aspirin", "dose", "night", "ward", "chest"]
WORDS += ["clear", "stable", "morning", "kidney", "oxygen", "discharge"]
CORPUS = [f"The {a} of {b} was {c}.\n" for a, b, c in itertools.permutations(WORDS, 3)]


def test_tokenizer_reaches_the_vocabulary_asked_for() -> None:
    assert len(train_tokenizer(CORPUS, 320)) == 320


def test_tokenizer_stays_smaller_where_the_corpus_is_poor() -> None:
    assert len(train_tokenizer(["aaaa bb"], 512)) < 512


@pytest.mark.parametrize(
    "text", ["The fever was stable.", "  two  spaces\n\ttab , comma", "ß 漢字 🩺 \x00 e\u0301", "don't  ."]
)
def test_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = train_tokenizer(CORPUS, 320)
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.unk_token is None


def test_tokenizer_adds_no_special_token_by_itself() -> None:
    tokenizer = train_tokenizer(CORPUS, 320)
    assert not set(tokenizer("The pulse")["input_ids"]) & set(tokenizer.all_special_ids)


def test_special_tokens_have_fixed_ids() -> None:
    tokenizer = train_tokenizer(CORPUS, 320)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (PAD_TOKEN, 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 1)
    assert tokenizer.bos_token_id == 1
    assert tokenizer(END_OF_TEXT)["input_ids"] == [1]


def test_tokenizer_pads_on_the_right() -> None:
    batch = train_tokenizer(CORPUS, 320)(["a", "abc, \n xyz"], padding=True)
    assert batch["input_ids"][0][-1] == 0
    assert batch["attention_mask"][0][0] == 1


def test_training_is_deterministic_over_streams() -> None:
    first = train_tokenizer(iter(CORPUS), 400)
    second = train_tokenizer(list(CORPUS), 400)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize("texts", [[], [""], ["", " \n"]])
def test_training_refuses_corpus_without_text(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(texts, 320)


def test_training_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(DataError, match="surrogate"):
        train_tokenizer(["fine", "a\ud800"], 320)


def test_training_refuses_vocabulary_below_300() -> None:
    with pytest.raises(DataError, match="300"):
        train_tokenizer(CORPUS, 299)


def test_training_passes_on_the_readers_error() -> None:
    def broken() -> Iterator[str]:
        yield "one"
        raise DataError("line 2 is not JSON")

    with pytest.raises(DataError, match="line 2"):
        train_tokenizer(broken(), 320)
