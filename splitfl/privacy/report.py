"""The privacy section of a client's report: what left, what that is worth, and to whom. It says only what is true.

Everything is read from the ledger, never from what was planned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from splitfl.privacy.accounting import epsilon_of, group_mu, guess_bound, mean_bits, mu_for
from splitfl.privacy.ledger import EVERYTHING, Ledger, ReleaseKind
from splitfl.privacy.policy import Policy

OFF = "No noise was added: the server can read the text, and labels can be recovered from gradients."
NOT_AUDITED = "Not audited yet: `splitfl audit` attacks what left."
NEIGHBOURS = "one record replaced by another of the same public padded length"
GRADIENTS = ReleaseKind.GRADIENT.value
ROUNDING = 1 + 1e-9  # a budget that is spent to its end is not exceeded
SEVERAL = 10  # records of somebody for whom an epsilon is said
ACTIVATIONS = (ReleaseKind.ACTIVATION.value, ReleaseKind.HELD_OUT_ACTIVATION.value)


def privacy_report(
    policy: Policy, ledger: Ledger, *, simulated: bool = False, audit: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What left by kind, its epsilons, and who is protected against whom. ``audit`` is an earlier audit's result."""
    alone, whole = epsilons(policy, ledger, simulated=simulated)
    mu = math.inf if whole is None else kept_mu(policy, ledger)
    report: dict[str, Any] = {
        "mode": policy.mode,
        "statement": statement(policy, ledger, whole, alone, mu, audit, simulated=simulated),
        "unit": policy.unit,
        "neighbours": NEIGHBOURS,
        "delta": policy.delta,
        "epsilon_activations": alone,
        "epsilon": whole,
        "mean_bits": mean_bits(mu) if whole is not None else None,
        "guess_bound": guess_bound(mu, 0.5) if whole is not None else None,
        "most_spent": most_spent(policy, ledger) if whole is not None else None,
        "stayed": stayed(policy, ledger),
        "told": told(private=policy.private),
        "left": {
            kind: {"releases": ledger.releases[kind], "bytes": ledger.bytes[kind]} for kind in sorted(ledger.releases)
        },
        "parties": parties(policy, ledger, whole),
        "ledger": {"rows": ledger.count, "head": ledger.head.hex()},
    }
    if policy.private:
        report["several_records"] = several_records(policy, ledger, None if whole is None else mu)
    return report


def kept_mu(policy: Policy, ledger: Ledger) -> float:
    """mu that the budgets keep; of what the unit that spent most has spent, without a target and where that is more."""
    spent = math.sqrt(most_spent(policy, ledger))
    return spent if policy.epsilon is None or exceeded(policy, ledger) else mu_for(policy.epsilon, policy.delta)


def exceeded(policy: Policy, ledger: Ledger) -> bool:
    """Whether a unit has spent more than the target: under earlier terms, which counts for good."""
    if policy.epsilon is None:
        return False
    return most_spent(policy, ledger) > mu_for(policy.epsilon, policy.delta) ** 2 * ROUNDING


def epsilons(policy: Policy, ledger: Ledger, *, simulated: bool) -> tuple[float | None, float | None]:
    """epsilon of the activations alone, and of the whole transcript; None = no bound.

    With a target it is the target: what happens to be spent, read off and acted upon, is no guarantee. Without one, and
    where more left under earlier terms, it is that of the unit that spent most.
    """
    if simulated or not policy.private:
        return None, None
    most = most_spent(policy, ledger)
    alone = most_spent(policy, ledger, ACTIVATIONS)
    alone_epsilon = None if ledger.tainted & set(ACTIVATIONS) else bounded_epsilon(alone, policy.delta)
    if ledger.tainted or not math.isfinite(most):
        return alone_epsilon, None
    kept = policy.epsilon is not None and not exceeded(policy, ledger)
    return alone_epsilon, policy.epsilon if kept else bounded_epsilon(most, policy.delta)


def bounded_epsilon(mu_squared: float, delta: float) -> float | None:
    """None where nothing bounds it."""
    return epsilon_of(math.sqrt(mu_squared), delta) if math.isfinite(mu_squared) else None


def most_spent(policy: Policy, ledger: Ledger, kinds: tuple[str, ...] | None = None) -> float:
    """mu^2 of the unit that spent most, over rows of these kinds (None: all)."""
    spent: dict[bytes, float] = {}
    for kind, by_record in ledger.spent_by_kind.items():
        if kinds is None or kind in kinds:
            for key, value in by_record.items():
                spent[key] = spent.get(key, 0.0) + value
    if policy.unit == "client":
        return sum(spent.values())
    shared = spent.pop(EVERYTHING, 0.0)
    return shared + max(spent.values(), default=0.0)


def statement(
    policy: Policy,
    ledger: Ledger,
    whole: float | None,
    alone: float | None,
    mu: float,
    audit: Mapping[str, Any] | None,
    *,
    simulated: bool,
) -> str:
    """The mode's sentence, with the figures that hold."""
    if not policy.private:
        return OFF
    if simulated:
        return "Simulated: the noise came from a seed, so it protects nothing, and no epsilon holds."
    if policy.mode == "certified" and whole is not None:
        more = f" More than the target of {policy.epsilon:g}: earlier terms let more out." * exceeded(policy, ledger)
        return (
            f"epsilon = {whole:.3g} at delta = {policy.delta:g} for each {policy.unit} ({NEIGHBOURS}), against whoever "
            f"sees all that left. It tells {mean_bits(mu):.2g} bits on average, at most.{more}"
        )
    if not ledger.releases:
        return "No guarantee. Nothing has left yet."
    figures = f"Activations alone: epsilon = {shown(alone)}; whole transcript: {shown(whole)}."
    return f"No guarantee. {audited(audit)} {figures}"


def audited(audit: Mapping[str, Any] | None) -> str:
    """What the attacks got out of what left."""
    if audit is None:
        return NOT_AUDITED
    low, high = audit["interval"]
    return (
        f"Our attacks recovered {audit['recovery']:.0%} [{low:.0%}, {high:.0%}] of tokens, assuming an honest server."
    )


def shown(epsilon: float | None) -> str:
    return "none (no bound)" if epsilon is None else f"{epsilon:.4g}"


def stayed(policy: Policy, ledger: Ledger) -> list[str]:
    """What never left."""
    losses = [] if ledger.releases[ReleaseKind.METRIC.value] else ["losses"]
    lengths = ["true lengths of records"] if policy.private else []
    return ["the data file", "label ids", *losses, "moments of the optimizer", *lengths]


def told(*, private: bool) -> list[str]:
    """What the server learns beside the releases."""
    always = ["this client's name", "its cut, number format and link", "when it works"]
    if not private:
        return [*always, "number and lengths of records", "counts of label tokens"]
    records = "number, order, recurrence and padded lengths of records, and which are held out"
    return [*always, records, "the number of rows in its ledger"]


def several_records(policy: Policy, ledger: Ledger, mu: float | None) -> str:
    """What a person reckons with who is behind several of the records; ``mu`` is a record's, None = no bound."""
    if policy.unit == "client":
        return "all records of this client together are the unit"
    if mu is None:
        return "somebody with k records: sqrt(k) mu for activations, no bound for the rest"
    direct = set(+ledger.releases) <= {*ACTIVATIONS, GRADIENTS}
    several = epsilon_of(group_mu(mu, SEVERAL, direct=direct), policy.delta)
    return (
        "somebody with k records: sqrt(k) mu for activations and gradients, up to k mu for anything else; "
        f"with {SEVERAL}: epsilon = {shown(several)} at most"
    )


def parties(policy: Policy, ledger: Ledger, whole: float | None) -> list[dict[str, str]]:
    """Who sees what, and what protects a record against them. From what has left, not from what was meant to."""
    if not policy.private:
        bound = "nothing"
    elif policy.mode == "certified" and whole is not None:
        bound = "epsilon as stated"
    else:
        bound = "noise, without a guarantee"
    trained = trained_by_it(ledger)
    plain = ReleaseKind.WEIGHTS.value in ledger.tainted or GRADIENTS in ledger.tainted or not policy.private
    shared = "nothing but averaging with others" if plain else "epsilon of the whole transcript; no amplification"
    protection = shared if trained else "nothing of this client is in it"
    return [
        {"party": "server: trunk and merging", "sees": "all that left, by record", "protection": bound},
        {"party": "other clients", "sees": trained or "nothing of this client", "protection": protection},
        {"party": "whoever gets the exported model", "sees": trained or "no weight of it", "protection": protection},
        {
            "party": "a thief of this client's state folder",
            "sees": "trained weights and their moments, the client's TLS key; releases are encrypted, their key is "
            "elsewhere",
            "protection": "the key file, while it is not stolen too",
        },
    ]


def trained_by_it(ledger: Ledger) -> str:
    """Which weights that others get have learned from this client."""
    merged = ["merged weights"] if ledger.releases[ReleaseKind.WEIGHTS.value] else []
    trunk = ["a trunk trained on its gradients"] if ledger.releases[GRADIENTS] else []
    return " and ".join([*merged, *trunk])
