"""``splitfl init``, ``splitfl eval`` and ``splitfl adapt``. Torch is imported inside, so that --help stays quick."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from splitfl.console import command, note, print_json


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the checkpoint.")],
    corpus: Annotated[list[Path], typer.Option(help="Text files for the tokenizer; may be given several times.")],
    family: Annotated[str, typer.Option(help="Model family, for example llama, qwen2, gpt2.")] = "llama",
    layers: Annotated[int, typer.Option(help="Blocks.")] = 8,
    hidden: Annotated[int, typer.Option(help="Width of the hidden states.")] = 256,
    vocab: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 2048,
    max_length: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Make a small Hugging Face checkpoint with random weights and a tokenizer of its own."""
    with command(verbose=verbose):
        from splitfl.data.readers import open_corpus
        from splitfl.split.create import create_checkpoint

        texts = (example.plain_text() for path in corpus for example in open_corpus(path, skip_bad=skip_bad))
        create_checkpoint(
            folder,
            family=family,
            layers=layers,
            hidden=hidden,
            vocab=vocab,
            corpus=texts,
            seed=seed,
            max_length=max_length,
        )
        note(f"wrote {folder}: {family}, {layers} blocks, hidden {hidden}")
        note(f"serve it with: splitfl serve {folder} --state STATE")


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a Hugging Face checkpoint.")],
    data: Annotated[Path, typer.Option(help="Text: .jsonl, .csv, .txt, .parquet, or a folder of them.")],
    federation: Annotated[Path | None, typer.Option(help="federation.toml, for record length and packing.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Measure a checkpoint on text: loss in nats per token, and perplexity."""
    with command(verbose=verbose):
        from splitfl.config import load_federation
        from splitfl.lab.whole import evaluate_folder
        from splitfl.split.modes import choose_device

        loss = evaluate_folder(model, data, load_federation(federation), choose_device(device), skip_bad)
        facts = {"loss": loss.mean, "perplexity": math.exp(min(50.0, loss.mean)), "tokens": loss.tokens}
        if as_json:
            print_json(facts)
        else:
            print(f"loss {loss.mean:.4f} nats per token, perplexity {facts['perplexity']:.2f}, {loss.tokens} tokens")


def adapt(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a Hugging Face checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the adapted checkpoint and its release.")],
    public: Annotated[list[Path], typer.Option(help="Public text; may be given several times.")],
    cut: Annotated[str, typer.Option(help="BOTTOM,TOP: blocks that clients keep.")] = "1,1",
    rank: Annotated[int, typer.Option(help="Numbers released for each token.")] = 16,
    sigma: Annotated[float, typer.Option(help="Noise in each of them, in units of the clip norm.")] = 0.5,
    ends_steps: Annotated[int, typer.Option(help="Optimizer steps of the ends alone, first.")] = 1000,
    steps: Annotated[int, typer.Option(help="Optimizer steps with the trunk, noise on.")] = 1000,
    records: Annotated[int, typer.Option(help="Records in a step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens in a record.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="AdamW's peak step size.")] = 1e-3,
    compute: Annotated[str, typer.Option(help="Arithmetic: auto, fp32 or bf16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the data order and of this training's noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Make a narrow release: learn on public text, noise on, to send little and keep the rest at home."""
    with command(verbose=verbose):
        from splitfl.cut import Cut
        from splitfl.lab.adapt import Adaptation, publish
        from splitfl.split.modes import choose_device

        adaptation = Adaptation(
            Cut.parse(cut), rank, sigma, ends_steps, steps, records, max_length, learning_rate, compute, seed
        )
        facts = publish(model, out, public, adaptation, choose_device(device), skip_bad=skip_bad, say=note)
        if as_json:
            print_json(facts)
        else:
            print(f"wrote {out}: rank {rank}, noise {sigma}; loss {facts['loss']:.4f} nats per token in the last steps")
