"""What a client says to its person: events as they happen, and the closing report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from splitfl.console import has_terminal, note, note_live, print_json

if TYPE_CHECKING:
    from client_model.events import Event

LIVE = ("step", "baseline_step")  # on a terminal each such line replaces the one before


class EventPrinter:
    """Events as JSON lines on stdout, or as text for a person on stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def __call__(self, event: Event) -> None:
        if self.as_json:
            print_json({"event": event.event, **event.facts})
            return
        text = describe(event.event, event.facts)
        if event.event in LIVE and has_terminal():
            note_live(text)
        elif text:
            note(text)


#: what a client's person should know of the data, where it is not 0
REMARKS = {
    "skipped_rows": "rows skipped",
    "truncated_records": "rows cut off at batch.max_length",
    "parted_rows": "answers cut from their prompts by packing (batch.pack = false keeps rows whole)",
}


def describe(event: str, facts: dict[str, Any]) -> str:
    """One line for a person."""
    match event:
        case "fetching":
            return str(facts["text"])
        case "data":
            counts = f"{facts['train_records']} records to train on, {facts['held_out_records']} held out"
            text = f"data: {facts['rows']} rows, which make {counts}"
            return text + "".join(f", {facts[key]} {meaning}" for key, meaning in REMARKS.items() if facts[key])
        case "privacy":
            return f"privacy: {facts['mode']}. {facts['statement']}"
        case "ledger_went_back":
            return f"this client's ledger has {facts['rows']} rows, the server countersigned {facts['countersigned']}"
        case "baselines":
            return "training what this client would have reached without the trunk, to compare with"
        case "baseline_step":
            received = facts["bytes_received"] / 1e6
            return f"{facts['which']}, step {facts['step']} of {facts['steps']}, {received:.1f} MB received"
        case "data_changed":
            return "the data file has changed since this client began; going on with what is there now"
        case "waiting":
            opens = " (it opens when enough clients are there and a round under way is over)"
            return f"waiting for {facts['for_']}{opens if facts['for_'] == 'the next round' else ''}"
        case "step":
            sent, received = facts["bytes_sent"] / 1e6, facts["bytes_received"] / 1e6
            at = f"round {facts['round'] + 1} of {facts['rounds']} step {facts['step'] + 1} of {facts['steps']}"
            traffic = f"{sent:.1f} MB sent, {received:.1f} MB received"
            return f"{at}: loss {facts['loss']:.3f}, {facts['tokens_per_s']:.0f} tokens/s, {traffic}"
        case "evaluation":
            loss, words = facts["loss"], facts["perplexity"]
            return f"held-out loss {loss:.3f}, perplexity {words:.1f}, after {facts['round']} rounds"
        case "evaluation_failed":
            return f"held-out loss after {facts['round']} rounds could not be measured: {facts['reason']}"
        case "step_missed":
            return f"round {facts['round'] + 1} step {facts['step'] + 1} left out: {facts['reason']}"
        case "round_durable":
            late = "" if facts["merged"] else " (too late for this client's part)"
            return f"round {facts['round'] + 1} merged{late}"
        case "merge_missed":
            return "the merged weights took so long to come that newer ones have replaced them; asking for those"
        case "server_restarted":
            return f"the server restarted; going on after round {facts['durable_round'] + 1}"
        case "away_too_long":
            after = facts["durable_round"] + 1
            return f"this client was away for longer than the federation waits; going on after round {after}"
        case "cut_changed":
            anew = "; activations leave anew, and are charged anew" if facts["released_anew"] else ""
            return f"this client's cut was {facts['before']} and is {facts['now']} from now on{anew}"
        case "memory_short":
            return f"memory ran out; each micro-batch is computed in {facts['pieces']} pieces from now on"
        case "resumed":
            at = f"going on with round {facts['round'] + 1} at step {facts['step'] + 1}"
            return at + ("; the steps before it are done again from what is kept here" if facts["again"] else "")
    return ""


def print_report(report: dict[str, Any]) -> None:
    """The closing report for a person, on stdout."""
    losses = report["held_out_losses"]
    rounds = f"part in {report['rounds_taken']} of {report['rounds']} rounds"
    since = " since this start" if report["starts"] > 1 else ""
    lines = [f"{report['client']} in {report['federation']}: {rounds}, {report['seconds']:.0f} s{since}"]
    lines = [*not_earned(report["baselines"]), *lines, *beside(report["baselines"])]
    if losses:
        ends = [losses[0], losses[-1]][: len(losses)]
        said = ", ".join(f"{entry['loss']:.3f} after {entry['round']} rounds" for entry in ends)
        lines.append(f"  held-out loss: {said} (nats per token; lower is better)")
    lines += beside_personal(report)
    lines.append(f"  {describe('data', report['data'])}")
    sent, received = (report["bytes"][way] / 1e6 for way in ("bytes_sent", "bytes_received"))
    beside_it = "what left, measuring, what was sent again"
    lines.append(f"  link: {sent:.1f} MB sent ({beside_it}), {received:.1f} MB received")
    if report["starts"] > 1:
        lines.append(f"  rounds and link are counted over {report['starts']} starts of this client")
    if report["uncounted_starts"]:
        uncounted = f"{report['uncounted_starts']} of those starts after the last saved round"
        lines.append(f"  NOT counted on the link: traffic of {uncounted}")
    lines += [f"  {line}" for line in privacy_lines(report["privacy"])]
    lines.append(f"  trained ends: {report['weights']}")
    sys.stdout.write("\n".join(lines) + "\n")


def not_earned(baselines: dict[str, Any] | None) -> list[str]:
    """The first line of a report when splitting gave this client nothing for what it let out."""
    if baselines is None or baselines["earned"]:
        return []
    return ["Splitting did NOT pay for this client: without the trunk's help, or alone, it would have done as well."]


def beside(baselines: dict[str, Any] | None) -> list[str]:
    """The federated result beside what the client would have reached without it."""
    if baselines is None:
        return []
    said = {"federated": baselines["federated"], "ends-only": baselines["ends_only"], "top-only": baselines["top_only"]}
    figures = [f"{name} {loss:.3f}" if loss is not None else f"{name} not measured" for name, loss in said.items()]
    steps = f"these two with this client's {baselines['steps']} steps"
    return [f"  on this client's held-out records: {', '.join(figures)} (nats per token; {steps})"]


def beside_personal(report: dict[str, Any]) -> list[str]:
    """The merged weights beside the client's own, or that its own are all there is."""
    if report["share"] == "none":
        return ["  heads are personal: this client's ends were merged with nobody's"]
    last = report["held_out_losses"][-1:]
    if report["personal"] is None or not last or last[0]["round"] != report["rounds"]:
        return []
    merged = last[0]["loss"]
    return [
        f"  your own weights before the last merge: {report['personal']:.3f}; merged: {merged:.3f} (nats per token)"
    ]


def privacy_lines(privacy: dict[str, Any]) -> list[str]:
    """The privacy section of the closing report for a person."""
    lines = [f"privacy: {privacy['mode']}. {privacy['statement']}"]
    lines.append(f"stayed here: {', '.join(privacy['stayed'])}")
    lines.append(f"told: {', '.join(privacy['told'])}")
    for kind, count in privacy["left"].items():
        lines.append(f"left: {kind}, {count['bytes'] / 1e6:.2f} MB in {count['releases']} messages")
    if privacy["mode"] != "off":
        lines += [f"{p['party']}: sees {p['sees']}; protected by {p['protection']}" for p in privacy["parties"]]
        lines.append(privacy["several_records"])
    ledger = privacy["ledger"]
    lines.append(f"ledger: {ledger['rows']} rows, ending in {ledger['head'][:16]}")
    return lines
