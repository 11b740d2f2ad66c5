"""The one door out: clipped, noised, durable, counted; the same bytes are free, and what must not leave does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gates import open_gate, ref
from safetensors.torch import load_file
from torch import Tensor

from splitfl.codec.tensors import CodecName, decode_tensor
from splitfl.errors import NumericalError, PrivacyError, StorageError
from splitfl.files import sha256_of
from splitfl.privacy.accounting import epsilon_of
from splitfl.privacy.gate import Gate
from splitfl.privacy.keepsakes import read_keepsakes
from splitfl.privacy.ledger import ReleaseKind
from splitfl.privacy.once import digest
from splitfl.privacy.policy import Workload
from splitfl.privacy.report import OFF, privacy_report

BAD = [float("nan"), float("inf"), -float("inf")]
CPU = torch.device("cpu")


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(seed))  # (B, T, D)


def left(gate: Gate) -> dict[str, int]:
    return dict(gate.ledger.releases)


def once(gate: Gate, *numbers: int, seed: int = 0) -> list[str]:
    return gate.once.release(ReleaseKind.ACTIVATION, 0, [ref(n) for n in numbers], lambda: hidden(seed))


# mode off


@pytest.mark.parametrize(("codec", "element_bytes"), [("fp32", 4), ("bf16", 2)])
def test_gate_counts_each_release_and_its_bytes(tmp_path: Path, codec: CodecName, element_bytes: int) -> None:
    gate = open_gate(tmp_path, codec=codec)
    for seed in range(3):
        gate.release(ReleaseKind.ACTIVATION, 0, hidden(seed), [])
    gate.release(ReleaseKind.GRADIENT, 0, hidden(), [])
    assert privacy_report(gate.policy, gate.ledger)["left"] == {
        "activations": {"releases": 3, "bytes": 3 * 64 * element_bytes},
        "gradients": {"releases": 1, "bytes": 64 * element_bytes},
    }


def test_what_leaves_with_privacy_off_is_the_tensor_itself_and_has_no_bound(tmp_path: Path) -> None:
    gate = open_gate(tmp_path)
    payload = gate.release(ReleaseKind.ACTIVATION, 0, hidden(), [])
    assert torch.equal(decode_tensor(payload, CPU, what="hidden"), hidden())
    assert math.isinf(gate.ledger.total)
    report = privacy_report(gate.policy, gate.ledger)
    assert (report["mode"], report["statement"], report["epsilon"]) == ("off", OFF, None)


@pytest.mark.parametrize("mode", ["off", "measured"])
@pytest.mark.parametrize("bad", BAD)
def test_activation_that_is_not_finite_does_not_leave_and_is_not_counted(tmp_path: Path, mode: str, bad: float) -> None:
    gate, tensor = open_gate(tmp_path, mode, gradients="noised"), hidden()
    tensor[1, 2, 3] = bad
    with pytest.raises(NumericalError):
        gate.release(ReleaseKind.ACTIVATION, 0, tensor, [ref(1), ref(2)] if mode != "off" else [])
    if mode == "off":
        with pytest.raises(NumericalError):
            gate.release(ReleaseKind.GRADIENT, 0, tensor, [])
    else:
        with pytest.raises(NumericalError):
            gate.once.release(ReleaseKind.ACTIVATION, 0, [ref(1), ref(2)], lambda: tensor)
    assert left(gate) == {}
    assert gate.once.vault.names() == []


@pytest.mark.parametrize("bad", BAD)
def test_gradient_that_overflows_leaves_as_noise_alone_and_tells_nothing(tmp_path: Path, bad: float) -> None:
    """To refuse it would be an answer: a server can choose what overflows for one label and not for another."""
    gate = open_gate(tmp_path, "measured", gradients="noised", gradient_noise_multiplier=1e-9)
    tensor = hidden()
    tensor[1, 2, 3] = bad
    sent = decode_tensor(gate.release(ReleaseKind.GRADIENT, 0, tensor, [ref(1), ref(2)]), CPU, what="gradient")
    assert float(sent[0].norm()) == pytest.approx(1.0, rel=1e-3)
    assert float(sent[1].norm()) < 1e-6
    assert left(gate) == {"gradients": 2}


def test_weights_leave_exact_whatever_the_codec_and_are_counted(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, codec="bf16")
    weights = {"head": hidden()[0], "transposed": hidden()[0].t()}  # the second is not contiguous
    path = tmp_path / "update.safetensors"
    digest = gate.release_weights(0, weights, path)
    assert digest == sha256_of(path.read_bytes())
    got = load_file(path)
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)
    assert (left(gate), gate.ledger.bytes["weights"]) == ({"weights": 1}, path.stat().st_size)


def test_weights_that_find_no_room_on_the_disk_do_not_leave(tmp_path: Path) -> None:
    gate = open_gate(tmp_path)
    with pytest.raises(StorageError, match="update"):
        gate.release_weights(0, {"head": torch.ones(2)}, tmp_path / "no folder" / "update")
    assert left(gate) == {}


def test_weights_that_the_ledger_cannot_take_do_not_leave(tmp_path: Path) -> None:
    gate = open_gate(tmp_path)

    def broken(_: object) -> None:
        raise StorageError("the plug was pulled")

    gate.ledger.append = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(StorageError, match="plug"):
        gate.release_weights(0, {"head": torch.ones(2)}, tmp_path / "update")
    assert left(gate) == {}


@pytest.mark.parametrize("bad", BAD)
def test_weights_that_are_not_finite_do_not_leave_and_are_named(tmp_path: Path, bad: float) -> None:
    gate = open_gate(tmp_path)
    with pytest.raises(NumericalError, match="weight 'b'"):
        gate.release_weights(0, {"a": torch.ones(2), "b": torch.tensor([0.0, bad])}, tmp_path / "update")
    assert left(gate) == {}


# once for each record


def test_activation_is_clipped_noised_and_in_ledger_and_vault_before_anybody_has_its_bytes(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured", noise_multiplier=0.5)
    names = once(gate, 1, 2)
    rows = [row for row, _, _ in gate.ledger.rows()]
    assert [row.record for row in rows] == [ref(1).key, ref(2).key]
    assert all((row.sensitivity, row.sigma) == (2 * math.sqrt(8), 0.5) for row in rows)
    for name, row, clean in zip(names, rows, hidden(), strict=True):
        payload = gate.once.payload(name)
        assert digest(payload) == row.payload
        noise = decode_tensor(payload, CPU, what="it") - clean / clean.norm(dim=-1, keepdim=True).clamp_min(1)
        assert 0.2 < float(noise.std()) < 0.9
    assert len(gate.once.vault.names(b"activation/")) == 2


def test_same_record_again_is_free_and_the_same_bytes_even_after_a_restart(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured")
    first = [bytes(gate.once.payload(name).data) for name in once(gate, 1, 2)]
    again = [
        bytes(gate.once.payload(name).data) for name in once(gate, 1, 2, seed=9)
    ]  # whatever the bottom says by now
    restarted = open_gate(tmp_path, "measured")
    later = [bytes(restarted.once.payload(name).data) for name in once(restarted, 1, 2, seed=9)]
    assert first == again == later
    assert restarted.ledger.count == 2


def test_bottom_does_not_even_run_for_records_that_are_paid_for(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured")
    once(gate, 1, 2)
    gate.once.release(ReleaseKind.ACTIVATION, 1, [ref(2), ref(1)], lambda: pytest.fail("the bottom ran"))


def test_record_that_comes_twice_in_a_batch_is_drawn_and_charged_once(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured")
    names = once(gate, 1, 1)
    assert names[0] == names[1]
    assert gate.ledger.count == 1


def test_another_context_is_another_release_and_is_charged(tmp_path: Path) -> None:
    here = once(open_gate(tmp_path, "measured", context="cut 1"), 1, 2)
    assert set(here).isdisjoint(once(open_gate(tmp_path, "measured", context="cut 2"), 1, 2))
    again = open_gate(tmp_path, "measured")
    assert again.ledger.spent[ref(1).key] == pytest.approx(2 * (2 * math.sqrt(8) / 0.3) ** 2)


def test_another_mechanism_codec_or_padded_length_is_another_release_too(tmp_path: Path) -> None:
    gates = [open_gate(tmp_path / codec, "measured", codec) for codec in ("fp32", "bf16")]
    gates.append(open_gate(tmp_path / "louder", "measured", noise_multiplier=0.31))
    names = {gate.once.name_of(ref(1)) for gate in gates} | {gates[0].once.name_of(ref(1, 4))}
    assert len(names) == 4


def test_bytes_that_a_crash_left_without_a_row_are_paid_for_and_not_drawn_anew(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured")
    gate.ledger.append = lambda _: (_ for _ in ()).throw(StorageError("the plug was pulled"))  # type: ignore[method-assign]
    with pytest.raises(StorageError):
        once(gate, 1, 2)
    drawn = {name: gate.once.vault.get(name) for name in gate.once.vault.names(b"activation/")}
    after = open_gate(tmp_path, "measured")
    once(after, 1, 2, seed=9)
    assert {name: after.once.vault.get(name) for name in after.once.vault.names(b"activation/")} == drawn
    assert after.ledger.count == 2


def test_nothing_leaves_when_the_ledger_cannot_be_written(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured", gradients="noised")
    gate.ledger._file.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError):
        once(gate, 1, 2)
    with pytest.raises(StorageError):
        gate.release(ReleaseKind.GRADIENT, 0, hidden(), [ref(1), ref(2)])
    with pytest.raises(KeyError):
        gate.once.payload(gate.once.name_of(ref(1)))


def test_stored_release_that_was_exchanged_does_not_leave(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured")
    name, other = once(gate, 1, 2)
    gate.once.payload(name)
    stolen = gate.once.vault.get(b"activation/" + other.encode())
    assert stolen is not None
    gate.once.vault.put([(b"activation/" + name.encode(), stolen[:-4] + b"evil")])
    with pytest.raises(PrivacyError, match="not the one that was paid for"):
        gate.once.payload(name)


def test_names_tell_nothing_of_the_record_and_differ_between_clients(tmp_path: Path) -> None:
    gate, other = open_gate(tmp_path / "a", "measured"), open_gate(tmp_path / "b", "measured")
    other.once.secret = bytes(32)
    assert gate.once.name_of(ref(1)) != other.once.name_of(ref(1))
    assert ref(1).key.hex() not in gate.once.name_of(ref(1))


def test_everything_that_a_sampled_record_released_is_kept_for_the_audit(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured", gradients="noised")
    names = once(gate, 1, 2)
    sent = gate.release(ReleaseKind.GRADIENT, 0, hidden(), [ref(1), ref(2)])
    kept = read_keepsakes(gate.once.vault)
    assert [(entry.key, entry.kind) for entry in kept] == [(ref(1).key, "activations"), (ref(1).key, "gradients")]
    assert bytes(kept[0].payload.data) == bytes(gate.once.payload(names[0]).data)
    assert bytes(kept[1].payload.data) == bytes(sent.data)[: len(bytes(sent.data)) // 2]


# gradients, DP-SGD, weights


def test_gradient_is_clipped_for_each_record_and_stays_zero_behind_its_padding(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured", gradients="noised", gradient_clip_norm=2.0, gradient_noise_multiplier=1e-6)
    sent = decode_tensor(
        gate.release(ReleaseKind.GRADIENT, 0, hidden() * 100, [ref(1), ref(2, 4)]), CPU, what="gradient"
    )
    assert float(sent[0].norm()) == pytest.approx(2.0, rel=1e-3)
    assert float(sent[1].norm()) == pytest.approx(2.0, rel=1e-3)
    assert not sent[1, 4:].any()
    rows = [row for row, _, _ in gate.ledger.rows()]
    assert [(row.sensitivity, row.sigma) for row in rows] == [(4.0, 2e-6)] * 2


@pytest.mark.parametrize("kind", [ReleaseKind.GRADIENT, ReleaseKind.ACTIVATION])
def test_what_is_sent_anew_each_time_is_the_clipped_tensor_and_fresh_noise_of_its_sigma(
    kind: ReleaseKind, tmp_path: Path
) -> None:
    """Clipped alone it would have the same shape, the same rows in the ledger, and no privacy."""
    levels = {"noise_multiplier": 0.5, "gradient_noise_multiplier": 0.5}
    gate = open_gate(tmp_path, "measured", gradients="noised", clip_norm=3.0, gradient_clip_norm=3.0, **levels)
    tensor = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(0))  # (B, T, D)
    mechanism = gate.policy.gradients if kind is ReleaseKind.GRADIENT else gate.policy.activations
    assert mechanism is not None
    first, second = (
        decode_tensor(gate.release(kind, 0, tensor, [ref(1), ref(2, 4)]), CPU, what="it").double() for _ in range(2)
    )
    for record, length in enumerate((8, 4)):
        own = slice(record, record + 1), slice(0, length)
        clipped = mechanism.clipped(tensor[own])
        noise = torch.stack([sent[own] - clipped for sent in (first, second)])
        assert [float(drawn.std()) for drawn in noise] == pytest.approx([1.5, 1.5], rel=0.06)
        assert abs(float(torch.corrcoef(noise.flatten(1))[0, 1])) < 0.1
    assert not first[1, 4:].any()


def test_gradients_do_not_leave_where_the_federation_sends_none(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured")
    with pytest.raises(PrivacyError, match="do not leave"):
        gate.release(ReleaseKind.GRADIENT, 0, hidden(), [ref(1), ref(2)])


def test_gradients_of_a_top_that_trains_without_dp_leave_no_bound_on_the_whole_from_the_first_on(
    tmp_path: Path,
) -> None:
    gate = open_gate(tmp_path, "measured", gradients="noised")
    once(gate, 1, 2)
    assert privacy_report(gate.policy, gate.ledger)["epsilon"] is not None
    gate.release(ReleaseKind.GRADIENT, 0, hidden(), [ref(1), ref(2)])
    report = privacy_report(gate.policy, gate.ledger)
    assert report["epsilon"] is None
    assert "Activations alone: epsilon = " in report["statement"]
    assert "whole transcript: none (no bound)." in report["statement"]


def test_before_anything_leaves_the_report_gives_no_figures(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured")
    gate.ledger.accept(b"t" * 32)
    assert privacy_report(gate.policy, gate.ledger)["statement"] == "No guarantee. Nothing has left yet."
    once(gate, 1, 2)
    assert "Activations alone: epsilon = " in privacy_report(gate.policy, gate.ledger)["statement"]


def test_weights_without_dp_leave_no_epsilon_and_with_dp_sgd_they_are_paid_for_by_its_steps(tmp_path: Path) -> None:
    plain = open_gate(tmp_path / "plain", "measured")
    once(plain, 1, 2)
    plain.release_weights(0, {"head": torch.ones(2)}, tmp_path / "update")
    report = privacy_report(plain.policy, plain.ledger)
    assert (report["epsilon"], report["epsilon_activations"] is None) == (None, False)
    private = open_gate(tmp_path / "private", "measured", dp_sgd=True, noise_multiplier=50.0, dp_noise_multiplier=4.0)
    once(private, 1, 2)
    for _ in range(20):
        private.charge_dp_sgd(0, [ref(1), ref(2)])
    private.release_weights(0, {"head": torch.ones(2)}, tmp_path / "update")
    mu_squared = (2 * math.sqrt(8) / 50) ** 2 + 20 * (2 / 4) ** 2
    assert private.ledger.spent[ref(1).key] == pytest.approx(mu_squared)
    whole = privacy_report(private.policy, private.ledger)["epsilon"]
    assert whole == pytest.approx(epsilon_of(math.sqrt(mu_squared), 1e-5))


# metrics


def test_shared_loss_is_clipped_for_each_record_and_noised_by_what_one_can_change(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "measured", metric_noise_multiplier=1e-9)
    shared = gate.release_metric(3, [1.0, math.inf, math.nan, -5.0], [ref(n) for n in range(4)])
    assert shared == pytest.approx((1 + 20 + 20 + 0) / 4, abs=1e-6)
    rows = [row for row, _, _ in gate.ledger.rows()]
    assert [(row.record, row.round) for row in rows] == [(ref(n).key, 3) for n in range(4)]
    assert all(row.sensitivity == 5.0 and row.sigma == pytest.approx(5e-9) for row in rows)
    noisy = open_gate(tmp_path / "noisy", "measured")
    assert noisy.release_metric(0, [1.0, 1.0], [ref(1), ref(2)]) != 1.0
    assert "losses" not in privacy_report(noisy.policy, noisy.ledger)["stayed"]


# budgets


def test_certified_noise_keeps_a_record_within_epsilon_for_all_its_releases(tmp_path: Path) -> None:
    work = Workload(records=2, held_out=0, draws=6, steps=3, padded_length=8)
    gate = open_gate(tmp_path, "certified", work=work, gradients="noised", dp_sgd=True)
    for round_ in range(work.participations):
        once(gate, 1, 2)
        gate.release(ReleaseKind.GRADIENT, round_, hidden(), [ref(1), ref(2)])
        gate.charge_dp_sgd(round_, [ref(1), ref(2)])
    report = privacy_report(gate.policy, gate.ledger)
    assert report["epsilon"] == pytest.approx(8.0, rel=1e-6)
    assert report["mean_bits"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(PrivacyError, match="budget is spent"):
        gate.release(ReleaseKind.GRADIENT, 9, hidden(), [ref(1), ref(2)])
    assert privacy_report(gate.policy, gate.ledger)["epsilon"] == pytest.approx(8.0, rel=1e-6)


def test_a_spent_budget_stays_spent_after_a_restart_and_does_not_touch_other_records(tmp_path: Path) -> None:
    first = open_gate(tmp_path, "certified", context="cut 1")
    once(first, 1, 2)
    again = open_gate(tmp_path, "certified", context="cut 2")  # re-planned: a new draw for the same record
    may_take_part = again.reserve()
    assert [may_take_part(ref(number).key, 8, True) for number in (1, 3)] == [False, True]
    with pytest.raises(PrivacyError):
        once(again, 1, 3)
    assert len(once(again, 3, 4)) == 2


def test_epsilon_of_a_client_counts_all_its_records_together(tmp_path: Path) -> None:
    gate = open_gate(tmp_path, "certified", unit="client")
    once(gate, 1, 2)
    once(gate, 3, 4)
    assert privacy_report(gate.policy, gate.ledger)["epsilon"] == pytest.approx(8.0, rel=1e-6)
    with pytest.raises(PrivacyError):
        once(gate, 5, 6)
