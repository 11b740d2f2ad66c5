"""Records hold the tokens of their rows, whole and in order; batches pad them; the order repeats from its cursor."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.data import packing
from splitfl.data.packing import DataOrder, RecordSet, collate
from splitfl.data.readers import Corpus, open_corpus
from splitfl.data.records import IGNORE, Encoded, Record, encode_example
from splitfl.errors import ConfigError, DataError

PAD = 2


def corpus_of(folder: Path, rows: list[Any]) -> Corpus:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": row} if isinstance(row, str) else row) for row in rows))
    return open_corpus(path)


def record_of(*ids: int) -> Record:
    return Record.from_encoded(Encoded(np.array(ids, np.int64), np.ones(len(ids), np.bool_)))


_words = st.lists(st.sampled_from(["cough", " fever", " é", "72", "."]), min_size=1, max_size=12).map("".join)
_pairs = st.fixed_dictionaries({"prompt": _words, "response": _words})


@given(
    rows=st.lists(st.one_of(_words, _pairs), min_size=1, max_size=8),
    max_length=st.integers(2, 20),
    cached=st.sampled_from([0, 30, 1 << 20]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_packed_blocks_joined_are_the_encoded_rows_joined(
    tokenizer: Any, rows: list[Any], max_length: int, cached: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CACHED_TOKENS", cached)
        corpus = corpus_of(Path(folder), rows)
        chosen = data.draw(st.permutations(range(len(rows))))
        encoded = [encode_example(corpus[row], tokenizer) for row in chosen]
        ids = np.concatenate([one.ids for one in encoded])
        mask = np.concatenate([one.loss_mask for one in encoded])
        blocks = [
            Record.from_encoded(Encoded(ids[i : i + max_length], mask[i : i + max_length]))
            for i in range(0, len(ids), max_length)
        ]
        expected = [block for block in blocks if block.label_tokens]
        if not expected:
            with pytest.raises(DataError):
                RecordSet(corpus, chosen, tokenizer, max_length, pack=True)
            return
        records = RecordSet(corpus, chosen, tokenizer, max_length, pack=True)
        assert len(records) == len(expected)
        assert records.unlabelled == sum(not block.label_tokens and len(block) > 1 for block in blocks)
        ends = np.cumsum([len(one.ids) for one in encoded])
        spans = zip(ends - [len(one.ids) for one in encoded], ends - 1, encoded, strict=True)
        prompted = [(a, z) for a, z, one in spans if not one.loss_mask.all()]
        assert records.parted == sum(a // max_length != z // max_length for a, z in prompted)
        for number in data.draw(st.permutations(range(len(records)))):
            assert records[number].input_ids.tolist() == expected[number].input_ids.tolist()
            assert records[number].labels.tolist() == expected[number].labels.tolist()


def test_packed_texts_lose_nothing_but_a_tail_of_one_token(tmp_path: Path, tokenizer: Any) -> None:
    corpus = corpus_of(tmp_path, ["a cough", "the fever", "and a cough"])
    ids = np.concatenate([encode_example(example, tokenizer).ids for example in corpus]).tolist()
    for max_length in range(2, len(ids) + 2):
        records = RecordSet(corpus, range(3), tokenizer, max_length, pack=True)
        joined = [token for record in records for token in record.input_ids.tolist()]
        assert joined == (ids[:-1] if len(ids) % max_length == 1 else ids)
        assert all(len(record) == max_length for record in records[:-1])


def test_padded_set_gives_one_record_a_row_cut_on_the_right(tmp_path: Path, tokenizer: Any) -> None:
    corpus = corpus_of(tmp_path, ["cough", "a cough and a fever and a cough", "fever"])
    records = RecordSet(corpus, [2, 1], tokenizer, 4, pack=False)
    assert [len(records), records.truncated, records.unlabelled] == [2, 1, 0]
    assert records[0].input_ids.tolist() == encode_example(corpus[2], tokenizer).ids.tolist()
    assert records[1].input_ids.tolist() == encode_example(corpus[1], tokenizer).ids[:4].tolist()
    assert [len(record) for record in records] == [len(records[0]), 4]


def test_padded_set_drops_and_counts_records_without_a_label(tmp_path: Path, tokenizer: Any) -> None:
    long = {"prompt": "a cough and a fever and a cough and a fever", "response": "fever"}
    mute = {"messages": [{"role": "user", "content": "cough"}]}
    corpus = corpus_of(tmp_path, [long, "a cough", mute])
    records = RecordSet(corpus, range(3), tokenizer, 4, pack=False)
    assert [len(records), records.unlabelled] == [1, 2]
    assert records[0].input_ids.tolist() == encode_example(corpus[1], tokenizer).ids.tolist()[:4]


@pytest.mark.parametrize("pack", [True, False])
def test_set_without_a_record_is_refused(tmp_path: Path, tokenizer: Any, pack: bool) -> None:
    corpus = corpus_of(tmp_path, [{"messages": [{"role": "user", "content": "cough"}]}])
    for rows in ([0], []):
        with pytest.raises(DataError, match=f"None of the {len(rows)} rows"):
            RecordSet(corpus, rows, tokenizer, 8, pack)


def test_set_refuses_a_length_without_room_to_predict(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError):
        RecordSet(corpus_of(tmp_path, ["a"]), [0], tokenizer, 1, pack=True)


def test_set_names_the_place_of_a_row_that_cannot_be_encoded(tmp_path: Path, tokenizer_with: Any) -> None:
    turn = {"messages": [{"role": "assistant", "content": "SECRET"}]}
    with pytest.raises(DataError, match=r"a\.jsonl, byte 14: .* no chat template") as caught:
        RecordSet(corpus_of(tmp_path, ["a", turn]), [0, 1], tokenizer_with(template=None), 8, pack=True)
    assert "SECRET" not in str(caught.value)


def test_set_raises_index_error_past_its_end(tmp_path: Path, tokenizer: Any) -> None:
    records = RecordSet(corpus_of(tmp_path, ["a cough"]), [0], tokenizer, 8, pack=False)
    assert records[-1].input_ids.tolist() == records[0].input_ids.tolist()
    with pytest.raises(IndexError):
        records[1]


@pytest.mark.parametrize(("pad_to", "width"), [(None, 3), (5, 5)])
def test_collate_pads_on_the_right_without_loss(pad_to: int | None, width: int) -> None:
    batch = collate([record_of(7, 8, 9), record_of(5, 6)], pad_to, PAD)
    assert batch.input_ids.tolist() == [[7, 8, 9] + [PAD] * (width - 3), [5, 6] + [PAD] * (width - 2)]
    assert batch.labels.tolist() == [[8, 9] + [IGNORE] * (width - 2), [6] + [IGNORE] * (width - 1)]
    assert batch.lengths.tolist() == [3, 2]
    assert batch.label_tokens == 3
    assert batch.input_ids.dtype == batch.labels.dtype == batch.lengths.dtype == np.int64
    assert repr(batch) == f"Batch(2 x {width}, 3 with loss)"


def test_collate_refuses_no_records_and_records_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no records"):
        collate([], None, PAD)
    with pytest.raises(ValueError, match="does not fit"):
        collate([record_of(1, 2, 3)], 2, PAD)


@given(n=st.integers(1, 9), seed=st.integers(0, 2**40), takes=st.lists(st.integers(0, 25), max_size=6))
@settings(max_examples=60, deadline=None)
def test_order_visits_every_record_once_an_epoch_however_it_is_taken(n: int, seed: int, takes: list[int]) -> None:
    order = DataOrder(n, seed)
    parts = [order.take(k) for k in takes]
    assert [len(part) for part in parts] == takes
    joined = [int(i) for part in parts for i in part]
    assert joined == DataOrder(n, seed).take(sum(takes)).tolist()
    assert order.cursor == divmod(sum(takes), n)
    for start in range(0, len(joined) - n + 1, n):
        assert sorted(joined[start : start + n]) == list(range(n))


@given(n=st.integers(1, 9), seed=st.integers(0, 99), before=st.integers(0, 30), after=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_order_goes_on_from_its_cursor(n: int, seed: int, before: int, after: int) -> None:
    order = DataOrder(n, seed)
    order.take(before)
    assert DataOrder.at(n, seed, order.cursor).take(after).tolist() == order.take(after).tolist()


def test_order_changes_with_epoch_and_seed_and_leaves_the_global_generator_alone() -> None:
    np.random.seed(3)
    state = np.random.get_state()[1].tolist()  # type: ignore[index]
    taken = DataOrder(50, 0).take(100).tolist()
    assert taken[:50] != taken[50:]
    assert taken[:50] != DataOrder(50, 1).take(50).tolist()
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index]


def test_order_is_pinned_since_a_restart_must_repeat_it() -> None:
    assert DataOrder(8, 7).take(16).tolist() == [0, 6, 7, 2, 4, 5, 1, 3, 6, 3, 1, 0, 2, 4, 7, 5]


@pytest.mark.parametrize("cursor", [(0, 5), (0, -1), (-1, 0)])
def test_order_refuses_a_cursor_that_does_not_fit_the_data(cursor: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="5 records now"):
        DataOrder.at(5, 0, cursor)


def test_order_refuses_nothing_to_order() -> None:
    for n, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="n >= 1"):
            DataOrder(n, seed)
    with pytest.raises(ValueError, match="cannot take"):
        DataOrder(1, 0).take(-1)
