"""The whole model in one process: evaluation, base training, and the baselines local-only and centralised.

The baselines get what the federation gets: the same freezing, the same schedule, the same clipping by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from client_model.records import ClientData, batches, open_tokenizer, pad_token
from client_model.trainer import on_device
from splitfl.config import Federation
from splitfl.data.packing import Batch, RecordSet
from splitfl.data.readers import open_corpus
from splitfl.federation.schedule import client_learning_rate, learning_rate
from splitfl.split.checkpoint import CheckpointFolder, load_segment
from splitfl.split.export import TrainedWeights, export_checkpoint
from splitfl.split.loss import HeadLoss, head_loss
from splitfl.split.modes import arithmetic, check_record_length, optimizer_spec, training_policy
from splitfl.split.optimizer import PartOptimizer
from splitfl.split.segment import Piece
from splitfl.split.training import set_up_training, stays_tied, tie_head


class WholeModel:
    """All blocks and both ends of a checkpoint on one device, trained as ``settings`` say: the trunk's blocks by the
    trunk's optimizer, the ends by the clients'. ``settings.alone`` trains all by one."""

    def __init__(self, folder: Path, settings: Federation, device: torch.device) -> None:
        self.folder = folder
        self.settings = settings
        self.device = device
        self.source = CheckpointFolder(folder)
        check_record_length(settings, self.source.config)
        self.layers: int = self.source.config.num_hidden_layers
        self.segment = load_segment(self.source, Piece(0, self.layers, embedding=True, head=True))
        policy = training_policy(settings, self.layers, device)
        set_up_training(self.segment, policy)
        if stays_tied(self.source.config, policy):
            tie_head(self.segment, self.segment.embedding)
        self.segment.to(device)
        bottom, trunk, top = self._parts()
        self.trunk = PartOptimizer(trunk, optimizer_spec(settings))
        self.ends = [PartOptimizer(part, optimizer_spec(settings, client=True)) for part in (bottom, top)]

    def _parts(self) -> list[dict[str, torch.nn.Parameter]]:
        """Trainable weights as bottom, trunk and top: each is clipped by its own norm, as in the federation."""
        cut = self.settings.cut
        parts: list[dict[str, torch.nn.Parameter]] = [{}, {}, {}]
        for name, weight in self.segment.named_weights():
            if weight.requires_grad:
                parts[self._part_of(name, cut.n_bottom, self.layers - cut.n_top)][name] = weight
        return parts

    def _part_of(self, name: str, bottom: int, top: int) -> int:
        block = self.segment.block_of(name)
        if block is not None:
            return 0 if block < bottom else 2 if block >= top else 1
        return (
            0 if name.startswith(f"{self.segment.anatomy.prefix}.{self.segment.anatomy.embedding}") else self._end(name)
        )

    def _end(self, name: str) -> int:
        positions = tuple(f"{self.segment.anatomy.prefix}.{part}." for part in self.segment.anatomy.positions)
        return 0 if positions and name.startswith(positions) else 2

    def loss(self, batch: Batch, *, train: bool) -> HeadLoss:
        """Summed loss of a batch; with ``train`` its gradients accumulate."""
        input_ids, labels, lengths = on_device(batch, self.device)
        with torch.set_grad_enabled(train), arithmetic(self.settings, self.device):
            final: Tensor = self.segment(self.segment.embed(input_ids), lengths)
            return head_loss(self.segment, final, labels, train=train)

    def step(self, batches_: Sequence[Batch], rate: float, ends_rate: float | None = None) -> HeadLoss:
        """One optimizer step over micro-batches: the mean over all their label tokens. The ends move by ``ends_rate``
        where it is given."""
        losses = [self.loss(batch, train=True) for batch in batches_]
        tokens = sum(loss.tokens for loss in losses)
        self.trunk.step(rate, lambda _: tokens)
        for part in self.ends:
            part.step(rate if ends_rate is None else ends_rate, lambda _: tokens)
        return HeadLoss(sum(loss.total for loss in losses), tokens)

    def evaluate(self, batches_: Iterable[Batch]) -> HeadLoss:
        """Summed loss without training."""
        losses = [self.loss(batch, train=False) for batch in batches_]
        return HeadLoss(sum(loss.total for loss in losses), sum(loss.tokens for loss in losses))

    def save(self, out: Path, card: str = "") -> None:
        """Write the model as it is now to a new Hugging Face folder."""
        tensors = {name: weight.detach().cpu() for name, weight in self.segment.named_weights()}
        trained = {name: tensor for name, tensor in tensors.items() if self._is_trained(name)}
        scale = self.settings.model.lora_alpha / self.settings.model.lora_rank
        transposed = self.source.config.model_type == "gpt2"
        weights = TrainedWeights(trained | self._factors(tensors), scale, transposed)
        export_checkpoint(self.folder, weights, out, card=card)

    def _is_trained(self, name: str) -> bool:
        return any(name in part.named for part in (self.trunk, *self.ends))

    @staticmethod
    def _factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if ".lora_" in name}


def train_like_federation(
    model: WholeModel, steps: Callable[[], list[Batch]], report: Callable[[int, HeadLoss], None] = lambda *_: None
) -> None:
    """As many steps as the federation's rounds have, on its schedule; ``steps`` gives each step's micro-batches."""
    rounds = model.settings.rounds
    for round_ in range(rounds.count):
        for step in range(rounds.local_steps):
            rates = (rate(model.settings, round_, step) for rate in (learning_rate, client_learning_rate))
            loss = model.step(steps(), *rates)
            report(round_ * rounds.local_steps + step, loss)


def local_steps(data: ClientData, name: str) -> Callable[[], list[Batch]]:
    """The steps that the client ``name`` sees in the federation, for local-only training."""
    order = data.order(name)
    return lambda: data.step(order)


def central_steps(clients: dict[str, ClientData]) -> Callable[[], list[Batch]]:
    """All clients' steps at once: the union batch of centralised training, the same total tokens."""
    orders = {name: data.order(name) for name, data in clients.items()}
    return lambda: [batch for name in sorted(clients) for batch in clients[name].step(orders[name])]


def evaluate_folder(
    model: Path, data: Path, settings: Federation, device: torch.device, skip_bad: bool = False
) -> HeadLoss:
    """Summed loss of a checkpoint over a whole data file, in records as ``settings`` cut them."""
    whole = WholeModel(model, settings, device)
    tokenizer = open_tokenizer(model)
    corpus = open_corpus(data, skip_bad=skip_bad)
    records = RecordSet(corpus, range(len(corpus)), tokenizer, settings.batch.max_length, settings.packs)
    return whole.evaluate(batches([records[i] for i in range(len(records))], settings, pad_token(tokenizer)))
