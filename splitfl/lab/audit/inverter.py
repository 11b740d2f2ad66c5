"""Learned inverters: networks trained on public text to read tokens from released states.

He, Zhang and Lee 2019 (Model Inversion Attacks Against Collaborative Inference); Pan et al. 2020 and Song and
Raghunathan 2020 for language models. Two stages of one network: an MLP a token, then a small bidirectional transformer
that also reads what stands around it. Noise is drawn afresh at each step, at the level that remains after the releases
of a record are averaged. Training stops when held-out public text no longer gains.

Neither stage can start weaker than what is simpler: the MLP is added to the linear discriminant of the public states
(Mahalanobis nearest neighbour with the tokens' frequencies), and the transformer is added to the MLP; both begin at
zero.

Gradients are no input of the network. Given the tokens and the trunk's hidden states, a gradient's noise is independent
of the activation's, so their log-likelihoods add (:mod:`splitfl.lab.audit.evidence`): that is the joint attack.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.observed import pieces
from splitfl.lab.audit.public import Knowledge, Texts

RATE, LOWEST_RATE, WARMUP = 1e-3, 1e-4, 50  # step sizes; steps until the first is reached
PATIENCE = 4  # looks at held-out text without gain before the step size falls


@dataclass(frozen=True)
class Training:
    """How long to train: until held-out text gains no more, but at most so many steps and until ``deadline``.

    ``deadline`` is a reading of ``time.monotonic()``; ``tokens`` are in one step.
    """

    steps: int = 2000
    deadline: float = float("inf")
    tokens: int = 1024
    look_every: int = 20


class Inverter(nn.Module):
    """Released states (B, T, R) -> logits over the vocabulary (B, T, V)."""

    weight: Tensor
    bias: Tensor
    offsets: Tensor
    spread: Tensor
    bank: Tensor
    log_prior: Tensor

    def __init__(self, knowledge: Knowledge, sigma: float, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        time, rank = knowledge.offsets.shape
        weight, bias = linear_discriminant(knowledge, sigma)
        self.register_buffer("weight", weight)  # (V, R)
        self.register_buffer("bias", bias)  # (V,)
        self.register_buffer("offsets", knowledge.offsets)  # (T, R)
        self.register_buffer("spread", (knowledge.states.square().mean() + sigma**2).sqrt())
        self.register_buffer("bank", knowledge.bank)  # (V, R)
        self.register_buffer("log_prior", knowledge.log_unigram)  # (V,)
        self.body = nn.Sequential(nn.Linear(2 * rank, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU())
        self.head = nn.Linear(width, len(weight))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.positions = nn.Parameter(torch.zeros(time, width))
        self.context = nn.ModuleList(quiet_layer(width) for _ in range(layers))
        self.reads_context = False

    def forward(self, released: Tensor, mask: Tensor) -> Tensor:
        """``mask`` (B, T): real tokens."""
        centred = self.centred(released)
        linear = centred @ self.weight.T + self.bias  # (B, T, V)
        expected = linear.softmax(-1) @ self.bank  # (B, T, R): the state without noise, as far as one token tells
        features = self.body(torch.cat([centred, expected], dim=-1) / self.spread)  # (B, T, W)
        if self.reads_context:
            features = self._with_context(features, mask)
        logits: Tensor = self.head(features) + linear
        return logits

    def centred(self, released: Tensor) -> Tensor:
        """Without what the position alone adds, (B, T, R)."""
        return released - self.offsets[: released.shape[1]]

    def linear(self, released: Tensor) -> Tensor:
        """What the discriminant alone says, (B, T, R) -> (B, T, V)."""
        return self.centred(released) @ self.weight.T + self.bias

    def _with_context(self, features: Tensor, mask: Tensor) -> Tensor:
        around = features + self.positions[: features.shape[1]]
        for layer in self.context:
            around = layer(around, src_key_padding_mask=~mask)
        return around


def quiet_layer(width: int) -> nn.Module:
    """A transformer layer that passes its input on until it is trained."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    for last in (layer.self_attn.out_proj, layer.linear2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return layer


def linear_discriminant(knowledge: Knowledge, sigma: float) -> tuple[Tensor, Tensor]:
    """Weights (V, R) and bias (V,) of the Gaussian classifier with one covariance for all tokens."""
    spread = knowledge.spread.double()
    floor = sigma**2 + 1e-6 * float(knowledge.states.square().mean()) + 1e-12
    inverse = torch.linalg.inv(spread + floor * torch.eye(len(spread), dtype=torch.double))
    bank = knowledge.bank.double()
    weight = bank @ inverse
    bias = knowledge.log_unigram.double() - (weight * bank).sum(-1) / 2
    return weight.float(), bias.float()


def train_inverter(
    inverter: Inverter,
    knowledge: Knowledge,
    probe: HeldOut,
    training: Training,
    generator: torch.Generator,
) -> float:
    """Train in place and leave the weights that read held-out public text best; their loss in nats per token."""
    best, kept = probe.loss(inverter), state_of(inverter)
    optimizer = torch.optim.AdamW(inverter.parameters(), lr=RATE, weight_decay=0.01)
    pace = Pace(optimizer)
    for step, (clean, texts) in enumerate(draws(knowledge, training, generator), start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_faster()):
            loss = loss_of(inverter, probe.mechanism.blur(clean, generator), texts)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(inverter.parameters(), 1.0)
        pace.warm(step)
        optimizer.step()
        if step % training.look_every:
            continue
        now = probe.loss(inverter)
        if now < best - 1e-4:
            best, kept = now, state_of(inverter)
            pace.waited = 0
        elif not pace.goes_on():
            break
    inverter.load_state_dict(kept)
    return best


@cache
def bf16_is_faster() -> bool:
    """Whether this processor multiplies matrices faster in bf16 (ten times where it has AMX; others emulate it)."""
    return spent_on_products(torch.bfloat16) < spent_on_products(torch.float32)


def spent_on_products(dtype: torch.dtype) -> float:
    """Seconds of the fastest of several products of (512, 512) matrices."""
    matrix = torch.ones(512, 512, dtype=dtype)
    spent = []
    for _ in range(8):
        started = clock.perf_counter()
        torch.mm(matrix, matrix)
        spent.append(clock.perf_counter() - started)
    return min(spent)


class Pace:
    """The step size: up during the first steps, down to a third whenever held-out text has not gained for a while."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.rate, self.waited = optimizer, RATE, 0

    def warm(self, step: int) -> None:
        """Set the step size of ``step``, from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, step / WARMUP)

    def goes_on(self) -> bool:
        """After a look without gain: False when even the smallest steps bring none."""
        self.waited += 1
        if self.waited >= PATIENCE:
            self.waited, self.rate = 0, self.rate / 3
        return self.rate >= LOWEST_RATE


def draws(knowledge: Knowledge, training: Training, generator: torch.Generator) -> Iterator[tuple[Tensor, Texts]]:
    """Clean states and texts of randomly drawn public records, until steps or time run out."""
    count, time = knowledge.train.ids.shape
    for _ in range(training.steps):
        if clock.monotonic() > training.deadline:
            return
        rows = torch.randint(count, (max(1, training.tokens // time),), generator=generator)
        yield knowledge.states[rows], Texts(knowledge.train.ids[rows], knowledge.train.lengths[rows])


def state_of(inverter: Inverter) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in inverter.state_dict().items()}


class HeldOut:
    """Held-out public records with noise drawn once, so that looks at them can be compared.

    ``mechanism`` is the one whose noise remains after averaging.
    """

    def __init__(self, knowledge: Knowledge, mechanism: Mechanism, generator: torch.Generator) -> None:
        self.texts, self.mechanism = knowledge.held_out, mechanism
        self.released = mechanism.apply(knowledge.model.hidden(self.texts.ids), generator)

    @torch.no_grad()
    def loss(self, inverter: Inverter) -> float:
        return float(loss_of(inverter, self.released, self.texts))


def loss_of(inverter: Inverter, released: Tensor, texts: Texts) -> Tensor:
    """Cross-entropy in nats per real token."""
    mask = texts.mask
    return F.cross_entropy(inverter(released, mask)[mask].float(), texts.ids[mask])


@torch.no_grad()
def read(inverter: Inverter, released: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the tokens behind released states, (B, T, R) -> (B, T, V)."""
    groups = zip(pieces(released, 8), pieces(mask, 8), strict=True)
    return torch.cat([inverter(piece, real).log_softmax(-1) for piece, real in groups])


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """torch's initialisers know the global generator alone: seed it from ours meanwhile, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def two_stages(
    knowledge: Knowledge,
    mechanism: Mechanism,
    budgets: tuple[Training, Training],
    generator: torch.Generator,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Inverter]]:
    """The same network after each stage: ``"mlp"``, then ``"transformer"``. Use each before asking for the next."""
    with seeded(generator):
        inverter = Inverter(knowledge, mechanism.sigma)
    probe = HeldOut(knowledge, mechanism, generator)
    for name, budget in zip(("mlp", "transformer"), budgets, strict=True):
        inverter.reads_context = name == "transformer"
        loss = train_inverter(inverter, knowledge, probe, budget, generator)
        say(f"{name}: {loss:.3f} nats per token of held-out public text")
        yield name, inverter
