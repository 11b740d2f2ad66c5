"""A created checkpoint opens in plain transformers, repeats from its seed, and is whole or absent."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from splitfl.data.tokenizer import train_tokenizer
from splitfl.errors import ConfigError, DataError, StorageError
from splitfl.split.create import create_checkpoint
from splitfl.split.families import FAMILIES

WORDS = ["patient", "fever", "pulse", "aspirin", "dose", "night", "ward", "chest"]
WORDS += ["clear", "stable", "morning", "kidney", "oxygen", "discharge"]
CORPUS = [f"The {a} of {b} was {c}.\n" for a, b, c in itertools.permutations(WORDS, 3)]
TEXT = "  The fever,\n\nof 漢字 don't <|endoftext|> 12345  was"


def create(folder: Path, **changes: Any) -> None:
    sizes = {"family": "llama", "layers": 2, "hidden": 64, "vocab": 320, "seed": 1, "max_length": 64}
    create_checkpoint(folder, **{"corpus": CORPUS, **sizes, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_opens_the_checkpoint(family: str, tmp_path: Path) -> None:
    create(tmp_path / "model", family=family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")

    reference = train_tokenizer(CORPUS, 320)
    assert tokenizer(TEXT)["input_ids"] == reference(TEXT)["input_ids"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == 64

    assert model.config.vocab_size == len(tokenizer) == 320
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)
        assert getattr(model.generation_config, name) == getattr(tokenizer, name)
    prompt = tokenizer("The fever", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        create(tmp_path / name, seed=seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_creation_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    create(tmp_path / "model")
    assert torch.equal(before, torch.random.get_rng_state())


def test_model_takes_the_size_the_tokenizer_reached(tmp_path: Path) -> None:
    create(tmp_path / "model", corpus=["aaaa bb"], vocab=512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) < 512


def test_creation_makes_missing_parents_and_fills_an_empty_folder(tmp_path: Path) -> None:
    create(tmp_path / "deep" / "er" / "model")
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["model"]
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_creation_refuses_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        create(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        create(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"family": "bloom"}, ConfigError), ({"hidden": 65}, ConfigError), ({"corpus": []}, DataError)],
)
def test_refused_creation_writes_nothing(changes: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        create(tmp_path / "model", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), StorageError)],
)
def test_interrupted_creation_leaves_no_half_folder(
    raised: BaseException, seen: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)  # the weights are on disk by then
    with pytest.raises(seen):
        create(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
