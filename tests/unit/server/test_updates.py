"""Uploads: nothing of them is trusted, and what was checked cannot be changed afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import write_safetensors
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from server_model.merge import merge_updates
from server_model.updates import ClientUpdate, Inbox, check_tensors
from splitfl.config import Merge
from splitfl.errors import RefusedError, StorageError
from splitfl.federation.merging import Merger
from splitfl.federation.robust import Contribution
from splitfl.federation.strategies import FedAvg, RoundFacts
from splitfl.files import sha256_of
from splitfl.split.shares import Shapes
from splitfl.wire.messages import TensorBytes, Update, Upload

SHAPES: Shapes = {"head.weight": (3, 2), "norm.weight": (2,)}


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def piece(data: bytes, offset: int = 0, total: int | None = None, digest: str = "ab" * 32) -> Upload:
    total = offset + len(data) if total is None else total
    return Upload(0, 0, digest, offset, total, TensorBytes("u8", (len(data),), data))


def update(data: bytes, tokens: int = 10) -> Update:
    return Update(0, 0, 0, tokens, sha256_of(data))


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path)


# receiving


def test_upload_arrives_in_pieces(inbox: Inbox) -> None:
    data = save(weights())
    for start in range(0, len(data), 50):
        received = inbox.receive("a", piece(data[start : start + 50], start, len(data)), len(data))
        assert received == min(start + 50, len(data))
    checked = inbox.check("a", update(data), SHAPES)
    assert (checked.client, checked.tokens) == ("a", 10)
    assert checked.path is not None
    assert checked.path.read_bytes() == data


def test_piece_that_is_repeated_changes_nothing(inbox: Inbox) -> None:
    data = save(weights())
    inbox.receive("a", piece(data[:50], 0, len(data)), len(data))
    inbox.receive("a", piece(data[20:50], 20, len(data)), len(data))
    inbox.receive("a", piece(data[50:], 50, len(data)), len(data))
    inbox.check("a", update(data), SHAPES)


def test_upload_that_starts_again_forgets_what_was_there(inbox: Inbox) -> None:
    data = save(weights())
    inbox.receive("a", piece(bytes(len(data) + 100)), len(data) + 100)
    inbox.receive("a", piece(data), len(data) + 100)
    inbox.check("a", update(data), SHAPES)


@pytest.mark.parametrize(
    "upload", [piece(bytes(101)), piece(b"x", 0, 101), piece(bytes(60), 50, 100), piece(b"x", 100, 100)]
)
def test_upload_over_its_limit_or_its_own_length_is_refused(inbox: Inbox, upload: Upload) -> None:
    inbox.receive("a", piece(bytes(100)), 100)
    with pytest.raises(RefusedError) as error:
        inbox.receive("a", upload, 100)
    assert error.value.code == "over_limit"


@pytest.mark.parametrize("there", [None, 10])
def test_gap_in_an_upload_is_refused(inbox: Inbox, there: int | None) -> None:
    if there:
        inbox.receive("a", piece(bytes(there), 0, 100), 100)
    with pytest.raises(RefusedError, match="gap"):
        inbox.receive("a", piece(b"x", 50, 100), 100)


def test_upload_to_a_full_disk_is_a_storage_error(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="No space left on device"):
        inbox.receive("a", piece(b"x"), 100)


# checking


def received(inbox: Inbox, data: bytes, client: str = "a") -> Update:
    inbox.receive(client, piece(data), len(data))
    return update(data)


def wrong_name() -> bytes:
    return save({"head.weight": torch.ones(3, 2), "norm.bias": torch.ones(2)})


def wrong_shape() -> bytes:
    return save({"head.weight": torch.ones(2, 3), "norm.weight": torch.ones(2)})


def wrong_dtype() -> bytes:
    return save({name: tensor.double() for name, tensor in weights().items()})


def missing() -> bytes:
    return save({"head.weight": torch.ones(3, 2)})


def surplus() -> bytes:
    return save({**weights(), "more": torch.ones(1)})


@pytest.mark.parametrize("spoil", [wrong_name, wrong_shape, wrong_dtype, missing, surplus])
def test_upload_of_other_tensors_is_refused_and_named(inbox: Inbox, spoil: object) -> None:
    data = spoil()  # type: ignore[operator]
    with pytest.raises(RefusedError, match=r"uploaded tensor '(head|norm|more)") as error:
        inbox.check("a", received(inbox, data), SHAPES)
    assert error.value.code == "bad_tensor"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_upload_with_numbers_that_are_none_is_refused_and_named(inbox: Inbox, value: float) -> None:
    tensors = weights()
    tensors["norm.weight"][1] = value
    with pytest.raises(RefusedError, match=r"'norm\.weight' holds NaN or infinity"):
        inbox.check("a", received(inbox, save(tensors)), SHAPES)


@pytest.mark.parametrize("data", [b"", b"short", bytes(8), b"\xff" * 64, save(weights())[:-1]])
def test_upload_that_is_no_safetensors_is_refused(inbox: Inbox, data: bytes) -> None:
    inbox.receive("a", piece(b"x"), 100)
    with pytest.raises(RefusedError) as error:
        inbox.check("a", received(inbox, data), SHAPES)
    assert error.value.code == "bad_tensor"


def test_upload_whose_offsets_lie_is_refused(tmp_path: Path, inbox: Inbox) -> None:
    # right names and shapes, but the bytes of one tensor are missing
    write_safetensors(tmp_path / "lie", {"head.weight": ("F32", (3, 2), bytes(24)), "norm.weight": ("F32", (2,), b"")})
    with pytest.raises(RefusedError) as error:
        inbox.check("a", received(inbox, (tmp_path / "lie").read_bytes()), SHAPES)
    assert error.value.code == "bad_tensor"


def test_upload_with_another_hash_is_refused(inbox: Inbox) -> None:
    received(inbox, save(weights()))
    with pytest.raises(RefusedError) as error:
        inbox.check("a", update(b"something else"), SHAPES)
    assert error.value.code == "not_found"


def test_update_without_an_upload_is_refused(inbox: Inbox) -> None:
    with pytest.raises(RefusedError, match="not the announced ones"):
        inbox.check("a", update(save(weights())), SHAPES)


def test_client_that_shares_nothing_needs_no_upload(inbox: Inbox) -> None:
    assert inbox.check("a", Update(0, 0, 0, 7, ""), {}) == ClientUpdate("a", 7, None)


def test_client_cannot_change_what_was_checked(inbox: Inbox) -> None:
    data = save(weights(1.0))
    checked = inbox.check("a", received(inbox, data), SHAPES)
    assert checked.path is not None
    with safe_open(checked.path, framework="pt") as file:  # the merge maps it
        inbox.receive("a", piece(b"x"), len(data))
        inbox.receive("a", piece(save(weights(torch.nan))), 10_000)
        assert torch.equal(file.get_tensor("norm.weight"), torch.ones(2))
    with pytest.raises(RefusedError):
        inbox.check("a", update(save(weights(torch.nan))), SHAPES)
    check_tensors(checked.path, SHAPES)


def test_clients_do_not_see_each_others_uploads(inbox: Inbox) -> None:
    data = save(weights())
    received(inbox, data, "a")
    with pytest.raises(RefusedError):
        inbox.check("b", update(data), SHAPES)


def test_forgotten_update_leaves_the_others(inbox: Inbox) -> None:
    data = save(weights())
    first = inbox.check("a", received(inbox, data, "a"), SHAPES)
    second = inbox.check("a", received(inbox, data, "a"), SHAPES)
    received(inbox, data, "b")
    inbox.forget(first)
    inbox.forget(ClientUpdate("c", 1, None))
    assert second.path is not None
    assert sorted(path.name for path in inbox.folder.iterdir()) == sorted([second.path.name, "b.part"])
    inbox.check("b", update(data), SHAPES)


# merging


def merged_by_mean(updates: list[ClientUpdate], own: dict[str, Contribution]) -> dict[str, torch.Tensor]:
    return merged_with(Merge(), updates, own)


def merged_with(
    merge: Merge, updates: list[ClientUpdate], own: dict[str, Contribution] | None = None
) -> dict[str, torch.Tensor]:
    """What FedAvg makes of updates to weights that were zero."""
    merger = Merger(FedAvg(merge), RoundFacts())
    found = merge_updates(updates, merger, lambda _, shape: torch.zeros(shape), own or {}, lambda _: {})
    return {name: merged.tensor for name, merged in found}


def test_merge_is_the_mean_by_tokens_of_all_who_sent_a_tensor(inbox: Inbox) -> None:
    first = inbox.check("a", received(inbox, save(weights(1.0)), "a"), SHAPES)
    second = inbox.check("b", received(inbox, save(weights(4.0)), "b"), SHAPES)
    updates = [first, ClientUpdate("b", 20, second.path), ClientUpdate("c", 99, None)]
    merged = merged_by_mean(updates, {})
    assert merged.keys() == SHAPES.keys()
    for tensor in merged.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 3.0))  # (10 x 1 + 20 x 4) / 30


def test_merge_counts_the_servers_own_copy(inbox: Inbox) -> None:
    sent = inbox.check("a", received(inbox, save(weights(1.0))), SHAPES)
    own = {"norm.weight": Contribution(torch.full((2,), 5.0), 30), "other": Contribution(torch.ones(1), 1)}
    merged = merged_by_mean([sent], own)
    assert merged["norm.weight"].tolist() == [4.0, 4.0]
    assert merged["head.weight"].unique().tolist() == [1.0]
    assert merged["other"].tolist() == [1.0]  # which nobody sent


def test_merge_of_clients_with_different_cuts_takes_each_tensor_from_those_who_have_it(inbox: Inbox) -> None:
    small: Shapes = {"norm.weight": (2,)}
    first = inbox.check("a", received(inbox, save(weights(1.0)), "a"), SHAPES)
    data = save({"norm.weight": torch.full((2,), 3.0)})
    second = inbox.check("b", received(inbox, data, "b"), small)
    merged = merged_by_mean([first, second], {})
    assert merged["norm.weight"].tolist() == [2.0, 2.0]
    assert merged["head.weight"].unique().tolist() == [1.0]


def test_merge_takes_the_change_of_a_late_update_at_its_discounted_weight(inbox: Inbox) -> None:
    in_time = inbox.check("a", received(inbox, save(weights(4.0)), "a"), SHAPES)
    late = inbox.check("a", received(inbox, save(weights(7.0)), "a"), SHAPES)  # of the same client, a round before
    late = replace(late, discount=0.5, start=lambda _, shape: torch.full(shape, 5.0))  # it has changed them by 2
    for tensor in merged_with(Merge(), [in_time, late]).values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, (10 * 4.0 + 5 * (0.0 + 2.0)) / 15))


def test_whole_update_is_clipped_over_all_its_tensors(inbox: Inbox) -> None:
    first = inbox.check("a", received(inbox, save(weights(100.0)), "a"), SHAPES)
    second = inbox.check("b", received(inbox, save(weights(0.01)), "b"), SHAPES)
    clipped = merged_with(Merge(clip_norm=1.0), [first])
    assert sum(float(tensor.square().sum()) for tensor in clipped.values()) == pytest.approx(1.0)
    small = merged_with(Merge(clip_norm=1.0), [second])
    assert all(torch.equal(tensor, torch.full_like(tensor, 0.01)) for tensor in small.values())


@pytest.mark.parametrize("merge", [Merge(aggregate="median"), Merge(aggregate="trimmed_mean")])
@pytest.mark.parametrize("lie", [-1.0, 1000.0, -1000.0, 3e38])
def test_one_liar_moves_no_weight_past_the_honest_ones(inbox: Inbox, merge: Merge, lie: float) -> None:
    values = {"a": 1.0, "b": lie, "c": 1.2}
    sent = [inbox.check(name, received(inbox, save(weights(v)), name), SHAPES) for name, v in values.items()]
    greedy = [sent[0], ClientUpdate("b", 10**12, sent[1].path), sent[2]]  # and claims all the tokens
    for tensor in merged_with(merge, greedy).values():
        assert 1.0 <= tensor.min() <= tensor.max() <= 1.2 + 1e-6


def test_krum_takes_one_whole_update(inbox: Inbox) -> None:
    values = {"a": 1.0, "b": 1.01, "c": 1.02, "d": 1.03, "e": -1000.0}
    updates = [inbox.check(name, received(inbox, save(weights(v)), name), SHAPES) for name, v in values.items()]
    merged = merged_with(Merge(aggregate="krum"), updates)
    assert {round(float(value), 2) for tensor in merged.values() for value in tensor.unique()} <= {1.01, 1.02}
    assert len({float(value) for tensor in merged.values() for value in tensor.unique()}) == 1


def test_krum_of_too_few_updates_leaves_the_weights_as_they_were(inbox: Inbox) -> None:
    updates = [inbox.check(name, received(inbox, save(weights(1.0)), name), SHAPES) for name in "abcd"]
    merged = merged_with(Merge(aggregate="krum"), updates)
    assert all(not tensor.any() for tensor in merged.values())
