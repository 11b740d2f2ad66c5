"""Causal enumeration: a bottom is causal and public, so a record can be decoded from left to right by trying tokens.

Given the tokens before a position, each candidate is put through the public bottom, clipped as the mechanism clips, and
compared with what was observed: under Gaussian noise the squared distance is its log-likelihood. A beam keeps the best
prefixes by that, a language model's prior (the public base model itself), and the evidence of the learned inverter and
of gradients, each with a weight fitted on public text. Without noise this is exact at any depth. After Morris et al.
2023 (Text Embeddings Reveal Almost As Much As Text) in spirit, but by search instead of a trained corrector; the same
search on a language model's hidden states: Wan et al. 2024, Dong et al. 2025 (Depth Gives a False Sense of Privacy).

Candidates come from a shortlist, for which the tokens' mean public states stand in for their states behind the prefix.
Where none of it explains the observation within what the noise allows, the whole vocabulary is tried.
"""

from __future__ import annotations

import time as clock
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfl.codec.tensors import CODECS
from splitfl.lab.audit.evidence import Evidence, fit_weights
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import Prefixes
from splitfl.lab.audit.observed import pieces
from splitfl.lab.audit.public import CHUNK, Knowledge

GROUP = 8  # records decoded together
TRIED_WIDTH = 4  # prefixes with which weights are compared
LAG = 4  # tokens read on before one is decided
TOLERANCE = 3e-3  # of a state's size: rounding and the clip's factor account for less
DEVIATIONS = 6  # of the noise's chi-square beyond which a candidate does not explain an observation


@dataclass(frozen=True)
class Search:
    """``width``: prefixes kept for each record; up to ``widest`` while time is left. ``shortlist``: tokens tried."""

    width: int = 8
    shortlist: int = 48
    widest: int = 128


@dataclass(frozen=True)
class Target:
    """What is decoded: averaged releases (B, T, R), single-token evidence, clip factors (B, 1, 1) or None."""

    released: Tensor
    evidence: Evidence
    scale: Tensor | None

    def __getitem__(self, rows: slice) -> Target:
        return Target(self.released[rows], self.evidence[rows], None if self.scale is None else self.scale[rows])


def make_target(
    knowledge: Knowledge, mechanism: Mechanism, released: Tensor, mask: Tensor, evidence: Evidence
) -> Target:
    """Estimate how far each record was clipped from a first reading of it: its norm hardly needs the right tokens."""
    if mechanism.clip == "token":
        return Target(released, evidence, None)
    guesses = evidence.inverter.argmax(-1).masked_fill(~mask, knowledge.pad_token_id)
    encoded = mechanism.encode(knowledge.model.hidden(guesses))
    if mechanism.sigma:
        return Target(released, evidence, mechanism.scale(encoded))
    ratios = (released * encoded).sum(-1) / encoded.square().sum(-1).clamp_min(1e-12)  # (B, T): exact at right guesses
    return Target(released, evidence, ratios.masked_fill(~mask, torch.nan).nanmedian(-1).values[:, None, None])


class Walk:
    """A beam over records (B), one position at a time. The sequences of record b are rows b K to b K + K - 1."""

    def __init__(self, knowledge: Knowledge, mechanism: Mechanism, target: Target, shortlist: int) -> None:
        self.knowledge, self.mechanism, self.target = knowledge, mechanism, target
        self.shortlist = min(shortlist, knowledge.model.vocab)
        self.records = len(target.released)
        self.bottom = Prefixes(knowledge.model.bottom, self.records)
        self.language = Prefixes(knowledge.model.whole, self.records)
        self.prior = knowledge.log_unigram.expand(self.records, -1)  # (N, V)
        self.scores = torch.zeros(self.records)  # (N,)
        self.tokens = torch.zeros(self.records, 0, dtype=torch.long)  # (N, t)
        rounding = CODECS[mechanism.codec].rounding * target.released.square().mean().sqrt()
        self.variance = mechanism.sigma**2 + float(rounding) ** 2

    @property
    def width(self) -> int:
        return len(self.tokens) // self.records

    def features(self, position: int, weights: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Candidates (N, C) for ``position``, and their log-likelihoods by kind (N, C, F): state, prior, the rest.

        ``forced`` (N,) is a token that has to be among them, at the last place unless it is anyhow.
        """
        evidence = self.target.evidence
        linear, *kinds = (
            kind[:, position].repeat_interleave(self.width, 0) for kind in (evidence.linear, *evidence.kinds())
        )
        cheap = [weight * kind for weight, kind in zip(weights, [linear, self.prior, *kinds], strict=True)]
        candidates = torch.stack(cheap).sum(0).topk(self.shortlist).indices  # (N, C)
        if forced is not None:
            absent = (candidates != forced[:, None]).all(-1)
            candidates[:, -1] = torch.where(absent, forced, candidates[:, -1])
        distance = self._distances(self.bottom, candidates, position)
        if forced is None:
            self._widen(candidates, distance, position)
        named = [self.prior, *kinds]
        columns = [-distance / (2 * self.variance), *(kind.gather(1, candidates) for kind in named)]
        return candidates, torch.stack(columns, dim=-1)

    def _distances(self, prefixes: Prefixes, candidates: Tensor, position: int, rows: Tensor | None = None) -> Tensor:
        """Squared distance between what was observed and what candidates (N, C) would have given, (N, C)."""
        rows = torch.arange(self.records).repeat_interleave(self.width) if rows is None else rows
        scale = None if self.target.scale is None else self.target.scale[rows]
        states = self.knowledge.clipped_alone(prefixes.alternatives(candidates), scale)  # (N, C, R)
        return (states - self.target.released[rows, position][:, None]).square().sum(-1)

    def _widen(self, candidates: Tensor, distance: Tensor, position: int) -> None:
        """Try the whole vocabulary, in place, behind the best prefix of records that no candidate explains."""
        observed = self.target.released[:, position]
        rank = observed.shape[-1]
        allowed = rank * self.mechanism.sigma**2 * (1 + DEVIATIONS * (2 / rank) ** 0.5)
        allowed = allowed + TOLERANCE**2 * observed.square().sum(-1)  # (B,)
        least = distance.view(self.records, -1).amin(-1)
        rows = ((least > allowed) & (self.shortlist < self.knowledge.model.vocab)).nonzero().squeeze(-1)
        if not len(rows):
            return
        best = rows * self.width + self.scores.view(self.records, -1).argmax(-1)[rows]
        prefixes = self.bottom.subset(best)
        vocabulary = pieces(torch.arange(self.knowledge.model.vocab), CHUNK)
        found = [self._distances(prefixes, piece.expand(len(rows), -1), position, rows) for piece in vocabulary]
        nearest = torch.cat(found, dim=1).topk(self.shortlist, largest=False)
        candidates[best], distance[best] = nearest.indices, nearest.values

    def advance(self, candidates: Tensor, features: Tensor, weights: Tensor, width: int) -> None:
        """Keep the best ``width`` continuations of each record."""
        total = self.scores[:, None] + features @ weights  # (N, C)
        best = total.view(self.records, -1).topk(min(width, total.numel() // self.records))  # (B, K)
        parents = best.indices // self.shortlist + torch.arange(self.records)[:, None] * self.width
        self.scores = best.values.flatten()
        self.follow(parents.flatten(), candidates.view(self.records, -1).gather(1, best.indices).flatten())

    def vote(self, position: int) -> Tensor:
        """The token at ``position`` that the beam of each record favours, (B,)."""
        tokens = self.tokens[:, position].view(self.records, -1)  # (B, K)
        weights = self.scores.view(self.records, -1).softmax(-1)
        favour = ((tokens[:, :, None] == tokens[:, None]) * weights[:, None]).sum(-1)
        return tokens.gather(1, favour.argmax(-1, keepdim=True)).squeeze(1)

    def follow(self, parents: Tensor, tokens: Tensor) -> None:
        """Go on with sequences ``parents`` (M,), each one token (M,) longer."""
        for prefixes in (self.bottom, self.language):
            prefixes.select(parents)
        self.bottom.extend(tokens)
        final = self.language.extend(tokens)
        with torch.no_grad():
            self.prior = self.knowledge.model.whole.logits(final).float().log_softmax(-1)
        self.tokens = torch.cat([self.tokens[parents], tokens[:, None]], dim=1)


def starting_weights(target: Target) -> Tensor:
    """State and prior half, inverter half, gradients in full: no evidence counts twice."""
    return torch.tensor([0.5, 0.5, 0.5, 1.0][: 2 + len(target.evidence.kinds())])


def fit_search(
    knowledge: Knowledge,
    mechanism: Mechanism,
    target: Target,
    ids: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    led: bool,
) -> Tensor:
    """Weights (F,) of the evidence, from public records (B, T): fitted behind the right prefixes where the search is
    ``led``, else behind those that it finds itself with ``weights`` (a prior is worth less behind a wrong prefix)."""
    walk = Walk(knowledge, mechanism, target, Search().shortlist)
    features, answers = [], []
    for position, tokens in enumerate(ids.T):
        candidates, found = walk.features(position, weights, tokens)
        real = mask[:, position]
        features.append(found[real])
        answers.append((candidates == tokens[:, None]).int().argmax(-1)[real])
        if led:
            walk.follow(torch.arange(len(ids)), tokens)
        else:
            walk.advance(candidates, found, weights, 1)
    return fit_weights(torch.cat(features), torch.cat(answers))


def choose_weights(
    knowledge: Knowledge, mechanism: Mechanism, target: Target, ids: Tensor, mask: Tensor, cheap: Tensor
) -> Tensor:
    """The weights with which a search recovers most of public records (B, T).

    A fit sees one position at a time; whether a search finds into the text, where its prior helps, or loses it is
    another matter. So fitted weights are tried, and the starting ones, and ``cheap`` (F - 2,), the evidence of single
    tokens alone: where nothing is gained by searching, the search must not lose either.
    """
    start = starting_weights(target)
    alone = torch.cat([torch.zeros(2), cheap])
    led = fit_search(knowledge, mechanism, target, ids, mask, start, led=True)
    own = fit_search(knowledge, mechanism, target, ids, mask, led, led=False)

    def recovered(weights: Tensor) -> int:
        walk = Walk(knowledge, mechanism, target, Search().shortlist)
        return int((decode(walk, weights, TRIED_WIDTH) == ids)[mask].sum())

    return max((led, own, start, alone), key=recovered)


def enumerate_tokens(
    knowledge: Knowledge, mechanism: Mechanism, target: Target, weights: Tensor, search: Search, deadline: float
) -> Tensor:
    """Decode as many records as there is time for (``time.monotonic()``), at least a few: token ids (B, T).

    While four times as wide a beam would still be done in time, all of them are decoded anew with it.
    """
    width = search.width
    while True:
        began = clock.monotonic()
        decoded = decode_all(knowledge, mechanism, target, weights, Search(width, search.shortlist), deadline)
        now = clock.monotonic()
        if not mechanism.sigma or width * 4 > search.widest or now + 4.5 * (now - began) > deadline:
            return decoded
        width *= 4


def decode_all(
    knowledge: Knowledge, mechanism: Mechanism, target: Target, weights: Tensor, search: Search, deadline: float
) -> Tensor:
    """Records a few at a time, until none is left or time runs out."""
    guesses: list[Tensor] = []
    for start in range(0, len(target.released), GROUP):
        if guesses and clock.monotonic() > deadline:
            break
        walk = Walk(knowledge, mechanism, target[start : start + GROUP], search.shortlist)
        guesses.append(decode(walk, weights, search.width))
    return torch.cat(guesses)


def decode(walk: Walk, weights: Tensor, width: int) -> Tensor:
    """Walk to the end, (B, T). Each token is the one that most of the beam, by weight, held ``LAG`` tokens later.

    The likeliest token is wanted at each place, not the likeliest text; what follows a token also speaks of it.
    """
    time = walk.target.released.shape[1]
    decided = []
    for position in range(time):
        walk.advance(*walk.features(position, weights), weights, width)
        if position >= LAG:
            decided.append(walk.vote(position - LAG))
    return torch.stack(decided + [walk.vote(position) for position in range(len(decided), time)], dim=1)
