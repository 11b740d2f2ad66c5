"""A small Hugging Face checkpoint from nothing but text: tokenizer, config and seeded random weights.

Behind ``splitfl init``. It gives the demo, the tests and the first hour with SplitFL a model that needs no
download. The folder appears whole or not at all. Nothing is trained here but the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from splitfl.data.tokenizer import train_tokenizer
from splitfl.errors import ConfigError, StorageError
from splitfl.files import give_usual_mode
from splitfl.split.families import build_small_model, small_config


def create_checkpoint(
    folder: Path,
    *,
    family: str,
    layers: int,
    hidden: int,
    vocab: int,
    corpus: Iterable[str],
    seed: int,
    max_length: int = 1024,
    tie: bool | None = None,
) -> None:
    """Write a checkpoint that plain ``AutoModelForCausalLM`` and ``AutoTokenizer`` open.

    ``corpus``: public texts, streamed once, for the tokenizer. ``vocab``: tokens to aim for; the model has as
    many rows as the tokenizer reached. The rest as in :func:`splitfl.split.families.small_config`.

    Raises :class:`ConfigError` if ``folder`` already holds something or the sizes do not fit the family,
    :class:`DataError` if the corpus has no text, :class:`StorageError` if the disk refuses.
    """
    folder = folder.resolve()
    _check_free(folder)

    def configure(vocab: int, **tokens: int) -> PreTrainedConfig:
        return small_config(family, layers=layers, hidden=hidden, vocab=vocab, max_length=max_length, tie=tie, **tokens)

    configure(vocab)  # refuses bad sizes before the tokenizer takes its time
    tokenizer = train_tokenizer(corpus, vocab)
    tokenizer.model_max_length = max_length
    config = configure(
        len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_whole(folder, build_small_model(config, seed), tokenizer)


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file", "Name a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", "Name a new folder, or empty this one first")


def _save_whole(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write beside ``folder``, then rename: an interruption leaves nothing that looks like a checkpoint."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            partial = Path(scratch) / folder.name  # one level down: scratch itself is private (0700)
            partial.mkdir()
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            for file in partial.glob("*.safetensors"):
                give_usual_mode(file)
            partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot write the checkpoint {folder}: {error}", "Check the disk's free space and permissions"
        ) from error
