"""Uploads: nothing of them is trusted, and what was checked cannot be changed afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import write_safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from server_model.updates import ClientUpdate, Inbox, check_tensors, merge_updates
from splitfl.errors import RefusedError, StorageError
from splitfl.federation.strategies import Contribution, FedAvg
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


def test_merge_is_the_mean_by_tokens_of_all_who_sent_a_tensor(inbox: Inbox) -> None:
    first = inbox.check("a", received(inbox, save(weights(1.0)), "a"), SHAPES)
    second = inbox.check("b", received(inbox, save(weights(4.0)), "b"), SHAPES)
    updates = [first, ClientUpdate("b", 20, second.path), ClientUpdate("c", 99, None)]
    merged = dict(merge_updates(updates, FedAvg(), lambda _, shape: torch.zeros(shape), {}))
    assert merged.keys() == SHAPES.keys()
    for tensor in merged.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 3.0))  # (10 x 1 + 20 x 4) / 30


def test_merge_counts_the_servers_own_copy(inbox: Inbox) -> None:
    sent = inbox.check("a", received(inbox, save(weights(1.0))), SHAPES)
    own = {"norm.weight": Contribution(torch.full((2,), 5.0), 30), "other": Contribution(torch.ones(1), 1)}
    merged = dict(merge_updates([sent], FedAvg(), lambda _, shape: torch.zeros(shape), own))
    assert merged["norm.weight"].tolist() == [4.0, 4.0]
    assert merged["head.weight"].unique().tolist() == [1.0]
    assert "other" not in merged


def test_merge_of_clients_with_different_cuts_takes_each_tensor_from_those_who_have_it(inbox: Inbox) -> None:
    small: Shapes = {"norm.weight": (2,)}
    first = inbox.check("a", received(inbox, save(weights(1.0)), "a"), SHAPES)
    data = save({"norm.weight": torch.full((2,), 3.0)})
    second = inbox.check("b", received(inbox, data, "b"), small)
    merged = dict(merge_updates([first, second], FedAvg(), lambda _, shape: torch.zeros(shape), {}))
    assert merged["norm.weight"].tolist() == [2.0, 2.0]
    assert merged["head.weight"].unique().tolist() == [1.0]


def test_merge_takes_the_change_of_a_late_update_at_its_discounted_weight(inbox: Inbox) -> None:
    in_time = inbox.check("a", received(inbox, save(weights(4.0)), "a"), SHAPES)
    late = inbox.check("b", received(inbox, save(weights(7.0)), "b"), SHAPES)
    start = lambda _, shape: torch.full(shape, 5.0)  # noqa: E731 - it has changed its weights by 2
    late = replace(late, discount=0.5, start=start)
    merged = dict(merge_updates([in_time, late], FedAvg(), lambda _, shape: torch.full(shape, 3.0), {}))
    for tensor in merged.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, (10 * 4.0 + 5 * (3.0 + 2.0)) / 15))


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.integers(1, 99), st.integers(1, 99), st.floats(0.01, 1))
def test_mean_with_a_late_change_is_the_mean_change_on_the_newest_weights(
    newest: float, change: float, late_change: float, tokens: int, late_tokens: int, discount: float
) -> None:
    previous = torch.tensor([newest], dtype=torch.float64)
    in_time = ClientUpdate("a", tokens, None).contribution("w", previous + change, previous)
    start = torch.tensor([1.0], dtype=torch.float64)
    late = ClientUpdate("b", late_tokens, None, discount, lambda *_: start)
    merged = FedAvg().merge("w", previous, [in_time, late.contribution("w", start + late_change, previous)])
    weight = late_tokens * discount
    mean = (tokens * change + weight * late_change) / (tokens + weight)
    assert merged.item() == pytest.approx(newest + mean, abs=1e-5)
