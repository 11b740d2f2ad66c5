"""Every format gives back, by number, the rows that were written; every bad input is one error with a remedy."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfl.data import formats, parquet, rowfile, separated
from splitfl.data.examples import Example
from splitfl.data.readers import FIRST_ROWS, Corpus, check_beginning, open_corpus, read_groups, split_corpus
from splitfl.errors import ConfigError, DataError

TURNS = [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Answer"}]

# Characters that tell readers apart: quotes, separators, line ends of every kind, a mark, and several byte lengths.
_text = st.text(st.sampled_from("ab \",;\t\n\r'\\\ufeff\x85\u2028é漢🩺\x00")).map(lambda text: text + "x")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(corpus: Corpus) -> list[str | None]:
    by_number = [corpus[i].text for i in range(len(corpus))]
    assert by_number == [example.text for example in corpus]
    return by_number


@given(rows=st.lists(_text, min_size=1, max_size=12), bom=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=60, deadline=None)
def test_jsonl_gives_back_random_rows_by_number(rows: list[str], bom: bool, newline: str) -> None:
    lines = [json.dumps({"text": row}, ensure_ascii=index % 2 == 0) for index, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", "\ufeff" * bom + newline.join(lines))
        assert texts(open_corpus(path)) == rows


@given(
    rows=st.lists(st.tuples(_text, _text), min_size=1, max_size=12),
    bom=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from([",", ";", "\t"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(max_examples=100, deadline=None)
def test_csv_gives_back_random_rows_by_number(
    rows: list[tuple[str, str]], bom: bool, newline: str, delimiter: str, quoting: int
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=newline, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    # Python 3.11 leaves a lone carriage return unquoted when lines end in a newline; that is no CSV.
    rows = [(a.replace("\r", ""), b.replace("\r", "")) for a, b in rows] if newline == "\n" else rows
    writer.writerows([("prompt", "note", "response"), *((a, "-", b) for a, b in rows)])
    with tempfile.TemporaryDirectory() as folder:
        corpus = open_corpus(write(Path(folder) / "a.csv", "\ufeff" * bom + buffer.getvalue()))
        expected = [Example(prompt=a, response=b) for a, b in rows]
        assert [corpus[i] for i in range(len(corpus))] == expected == list(corpus)


@given(rows=st.lists(_text, min_size=1, max_size=12), group=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_parquet_gives_back_random_rows_by_number_across_row_groups(rows: list[str], group: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), path, row_group_size=group)
        corpus = open_corpus(path)
        assert texts(corpus) == rows
        assert corpus.place(len(rows) - 1).endswith(
            f"row group {(len(rows) - 1) // group} row {(len(rows) - 1) % group}"
        )


def test_parquet_gives_messages_and_pairs(tmp_path: Path) -> None:
    table = pa.table({"messages": [TURNS, None], "prompt": [None, "P"], "response": [None, "R"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(open_corpus(tmp_path / "a.parquet")) == [
        Example(messages=tuple(TURNS)),
        Example(prompt="P", response="R"),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_txt_gives_paragraphs_between_blank_lines(tmp_path: Path, newline: str, bom: str) -> None:
    lines = ["", "Première ligne", "  zweite", "", " \t ", "", "漢字", "", "last", ""]
    corpus = open_corpus(write(tmp_path / "a.txt", bom + newline.join(lines)))
    assert texts(corpus) == ["Première ligne\n  zweite", "漢字", "last"]


def test_csv_passes_over_blank_lines_and_empty_cells(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "a.csv", "\r\ntext,prompt,response\r\n\r\none,,\r\n,ask,answer\r\ntwo\r\n"))
    assert list(corpus) == [Example(text="one"), Example(prompt="ask", response="answer"), Example(text="two")]


def test_csv_reads_a_field_longer_than_the_standard_limit(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "a.csv", 'text\n"' + "word\n" * 60_000 + '"\nshort\n'))
    assert len(corpus[0].text or "") == 300_000
    assert corpus[1].text == "short"


def test_folder_is_read_in_sorted_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ("b", ".hidden", "b/.git"):
        (tmp_path / name).mkdir()
    write(tmp_path / "c.TXT", "three")
    write(tmp_path / "b" / "x.jsonl", '{"text": "two"}')
    write(tmp_path / "a.csv", "text\none\n")
    for name in ("notes.docx", ".d.txt", ".hidden/e.txt", "b/.git/f.txt"):
        write(tmp_path / name, "never")
    corpus = open_corpus(tmp_path)
    assert texts(corpus) == ["one", "two", "three"]
    assert [path.name for path in corpus.paths] == ["a.csv", "x.jsonl", "c.TXT"]


def _parquet(**columns: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


BAD_ROWS: dict[str, tuple[str, str | bytes, str]] = {
    "broken json": ("a.jsonl", '{"text": "ok"}\n{"text": "SECRET"\n', "a.jsonl, line 2 is not valid JSON"),
    "json that is no object": ("a.jsonl", '["SECRET"]\n', "line 1 is JSON, but not an object"),
    "json too deep": ("a.jsonl", "[" * 100_000 + "\n", "line 1 is not JSON that can be read"),
    "json with a huge number": ("a.jsonl", '{"text": ' + "1" * 5000 + "}\n", "line 1 is not JSON that can be read"),
    "json with half a surrogate": ("a.jsonl", '{"text": "SECRET \\ud800"}', "line 1 has a text that is not valid"),
    "json not utf-8": ("a.jsonl", b'{"text": "ok"}\n\n{"text": "SECRET \xe9"}', "line 3 is not UTF-8"),
    "json without text": ("a.jsonl", '{"note": "SECRET"}', "line 1 has neither text"),
    "json with blank text": ("a.jsonl", '{"text": "  "}', "line 1 has an empty text"),
    "json of the wrong type": ("a.jsonl", '{"text": 7}', "line 1 has a text of type int"),
    "csv with an open quote": ("a.csv", 'text\nok\n"SECRET', "a.csv, line 3 is not valid CSV: unexpected end"),
    "csv with a stray quote": ("a.csv", 'text\n"SECRET" it\n', "line 2 is not valid CSV"),
    "csv with a bare carriage return": ("a.csv", "text\nSEC\rRET\n", "line 2 is not valid CSV"),
    "csv with too many fields": (
        "a.csv",
        "text,id\nSECRET, and more,7\n",
        "line 2 has 3 fields where the header has 2",
    ),
    "csv not utf-8": ("a.csv", b'text\n"two\nlines"\n"SECRET\n\xe9"\n', "line 4 is not UTF-8"),
    "csv without text": ("a.csv", "text,id\n,SECRET\n", "line 2 has neither text"),
    "csv with blank text": ("a.csv", "text\n   \n", "line 2 has an empty text"),
    "txt not utf-8": ("a.txt", b"ok\n\nSECRET \xff\n", "a.txt, line 3 is not UTF-8"),
    "parquet of the wrong type": ("a.parquet", _parquet(text=[1, 2]), "a.parquet, row 1 has a text of type int"),
    "parquet with a null": ("a.parquet", _parquet(text=["ok", None]), "row 2 has neither text"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_refused_with_its_place_and_not_its_text(tmp_path: Path, case: str) -> None:
    name, content, says = BAD_ROWS[case]
    with pytest.raises(DataError) as caught:
        open_corpus(write(tmp_path / name, content))
    assert says in caught.value.message
    assert ("iconv" if "not UTF-8" in says else "--skip-bad") in caught.value.remedy
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_counted_when_skipping(tmp_path: Path, case: str) -> None:
    name, content, _ = BAD_ROWS[case]
    write(tmp_path / name, content)
    write(tmp_path / "good.txt", "a good row")
    corpus = open_corpus(tmp_path, skip_bad=True)
    assert corpus.skipped >= 1
    assert "a good row" in texts(corpus)


ROWS_AFTER_A_STRAY_QUOTE = {
    "never closed": ('text\none\n"SECRET\nthree\nfour\n', "line 3 is not valid CSV: unexpected end", 3, []),
    "closed by the next": ('text\none\n"SECRET\nthree\n"four"\nfive\n', "line 3 is not valid CSV", 3, ["five"]),
}


@pytest.mark.parametrize("case", ROWS_AFTER_A_STRAY_QUOTE)
def test_stray_quote_names_all_that_it_swallows_and_skipping_counts_it(tmp_path: Path, case: str) -> None:
    content, says, lines, after = ROWS_AFTER_A_STRAY_QUOTE[case]
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError) as caught:
        open_corpus(path)
    assert f"a.csv, {says}" in caught.value.message
    assert f"swallows {lines} lines from here on" in caught.value.message
    assert "--skip-bad" not in caught.value.remedy  # it would leave out good rows as well
    assert "SECRET" not in str(caught.value)
    corpus = open_corpus(path, skip_bad=True)
    assert (texts(corpus), corpus.skipped) == (["one", *after], lines)


def test_rows_around_bad_ones_keep_their_places_when_skipping(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one"}\n{broken\n\n{"text": "twö"}\n{"text": ""}\n{"text": "three"}')
    write(tmp_path / "b.csv", 'text\n"four\n4"\n"stray" quote\nfive\n')
    corpus = open_corpus(tmp_path, skip_bad=True)
    assert texts(corpus) == ["one", "twö", "three", "four\n4", "five"]
    assert corpus.skipped == 3


UNUSABLE: dict[str, tuple[str, str | bytes | None, str]] = {
    "missing": ("a.jsonl", None, "there is no"),
    "empty jsonl": ("a.jsonl", "", "is empty"),
    "empty csv": ("a.csv", "", "is empty"),
    "empty txt": ("a.txt", b"\xef\xbb\xbf", "is empty"),
    "empty parquet": ("a.parquet", "", "is empty"),
    "blank lines": ("a.jsonl", "\n\n \n", "holds no usable rows"),
    "header alone": ("a.csv", "text\n", "holds no usable rows"),
    "bad rows alone": ("a.jsonl", "{\n{\n", "holds no usable rows; 2 bad rows were skipped"),
    "unknown format": ("a.docx", "SECRET", "not of a known format"),
    "csv without a text column": ("a.csv", "id,note\n1,SECRET\n", "has no text column, only id, note"),
    "csv with a prompt alone": ("a.csv", "prompt\nSECRET\n", "has no text column, only prompt"),
    "csv with messages alone": ("a.csv", "messages\nSECRET\n", "has no text column, only messages"),
    "csv without a header": ("a.csv", "SECRET of a patient,SECRET 7\n", "only 2 that look like data, not like names"),
    "csv out of excel": ("a.csv", "text\nSECRET\n".encode("utf-16"), "is UTF-16"),
    "text in big-endian utf-16": ("a.txt", b"\xfe\xff" + "SECRET".encode("utf-16-be"), "is UTF-16"),
    "workbook named csv": ("a.csv", b"PK\x03\x04SECRET\x00\xff", "is a zip archive"),
    "csv header not utf-8": ("a.csv", b"text,\xe9\n", "is not UTF-8 in its first line"),
    "parquet that is none": ("a.parquet", "SECRET" * 10, "is not a Parquet file"),
    "parquet without a text column": ("a.parquet", _parquet(note=["SECRET"]), "has no text column, only note"),
}


def test_column_names_may_have_capitals(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "a.csv", "ID,Text\n1,a cough\n"))
    assert corpus[0].text == "a cough"


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_file_is_refused_even_when_skipping(tmp_path: Path, case: str) -> None:
    name, content, says = UNUSABLE[case]
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        open_corpus(tmp_path / name, skip_bad=True)
    assert says in caught.value.message
    assert caught.value.remedy
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_file_shows_at_its_beginning(tmp_path: Path, case: str) -> None:
    name, content, says = UNUSABLE[case]
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=says):
        check_beginning(tmp_path / name, skip_bad=True)


def refusal(read: Callable[..., object], path: Path) -> str:
    """What is said of a file whose bad rows are skipped, "" for nothing."""
    try:
        read(path, skip_bad=True)
    except DataError as error:
        return error.message
    return ""


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_shows_at_the_beginning_unless_it_is_skipped(tmp_path: Path, case: str) -> None:
    name, content, says = BAD_ROWS[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        check_beginning(path)
    assert says in caught.value.message
    assert refusal(check_beginning, path) == refusal(open_corpus, path)  # where it is the only row


def test_beginning_is_all_that_is_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + "a row\n" * FIRST_ROWS + '"SECRET\n')
    check_beginning(path)
    with pytest.raises(DataError):
        open_corpus(path)


def test_folder_without_data_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / ".a.txt", "hidden")
    with pytest.raises(DataError, match="holds no data file"):
        open_corpus(tmp_path)


def test_parquet_is_refused_with_an_install_line_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", _parquet(text=["a"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as caught:
        open_corpus(path)
    assert "splitfl[parquet]" in caught.value.remedy


def test_parquet_is_refused_when_a_row_group_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 1000)
    path = write(tmp_path / "a.parquet", _parquet(text=[os.urandom(2000).hex()], other=["b"]))
    with pytest.raises(DataError, match="row group"):
        open_corpus(path)
    write(path, _parquet(text=["a"], other=[os.urandom(2000).hex()]))
    assert len(open_corpus(path)) == 1


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": "' + "long " * 50 + '"}\n{"text": "end"}\n', 2),
        ("a.csv", "text\nok\n" + "long " * 50 + "\nend\n", 3),
        ("a.csv", 'text\nok\n"' + "long\n" * 20 + "end\n", 3),
        ("a.txt", "ok\n\n" + "long " * 50 + "\n\nend\n", 3),
        ("a.txt", "ok\n\n" + "long\n" * 50 + "\nend\n", 3),
    ],
)
def test_row_over_the_limit_is_refused_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, line: int
) -> None:
    for module in (formats, rowfile, separated):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 64)
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"line {line} is longer than"):
        open_corpus(path)
    corpus = open_corpus(path, skip_bad=True)
    assert texts(corpus)[0] == "ok"
    assert texts(corpus)[-1] == "end"
    assert corpus.skipped >= 1


def test_file_that_changed_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\ntwo")
    corpus = open_corpus(path)
    write(path, "one and a half\n\ntwo")
    with pytest.raises(DataError, match="changed"):
        corpus[1]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        corpus[1]


def test_corpus_raises_index_error_past_its_end(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "a.txt", "one\n\ntwo"))
    assert corpus[-1].text == "two"
    with pytest.raises(IndexError):
        corpus[2]


def test_fingerprint_changes_with_name_size_and_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one")
    os.utime(path, ns=(1, 1))
    prints = [open_corpus(path).fingerprint, open_corpus(path).fingerprint]
    os.utime(path, ns=(2, 2))
    prints.append(open_corpus(path).fingerprint)
    write(path, "three")
    os.utime(path, ns=(2, 2))
    prints.append(open_corpus(path).fingerprint)
    prints.append(open_corpus(path.rename(tmp_path / "b.txt")).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4
    assert len(prints[0]) == 64


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_corpus_keeps_memory_flat_while_it_reads_a_file(tmp_path: Path, suffix: str) -> None:
    wrap: dict[str, Callable[[str], str]] = {
        "jsonl": lambda text: json.dumps({"text": text}) + "\n",
        "csv": lambda text: f'"{text}"\n',
        "txt": lambda text: text + "\n\n",
    }
    path = tmp_path / f"a.{suffix}"
    with path.open("w") as out:
        out.write("text\n" if suffix == "csv" else "")
        out.writelines(wrap[suffix](f"{number} " + "word " * 800) for number in range(2000))  # 8 MB
    tracemalloc.start()
    corpus = open_corpus(path)
    split_corpus(corpus, 0.1, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert (corpus[1999].text or "").startswith("1999 word")


def _corpus(folder: Path, rows: list[str]) -> Corpus:
    return open_corpus(write(folder / "a.jsonl", "\n".join(json.dumps({"text": row}) for row in rows)))


def test_split_puts_every_row_on_one_side_near_the_fraction(tmp_path: Path) -> None:
    train, held_out = split_corpus(_corpus(tmp_path, [f"row {i}" for i in range(1000)]), 0.2, seed=1)
    assert train.dtype == held_out.dtype == np.int64
    assert sorted([*train, *held_out]) == list(range(1000))
    assert 150 < len(held_out) < 250


def test_split_is_the_same_for_rows_in_another_order_and_format(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(100)]
    first = _corpus(tmp_path, rows)
    expected = {first[i].text for i in split_corpus(first, 0.3, seed=5)[1]}
    other = open_corpus(write(tmp_path / "b.csv", "text\n" + "\n".join(reversed(rows))))
    assert {other[i].text for i in split_corpus(other, 0.3, seed=5)[1]} == expected
    assert {other[i].text for i in split_corpus(other, 0.3, seed=6)[1]} != expected


@given(
    rows=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
    fraction=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.999999]),
    seed=st.integers(-5, 5),
)
@settings(max_examples=100, deadline=None)
def test_split_keeps_equal_rows_together_and_no_side_empty(rows: list[str], fraction: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = split_corpus(_corpus(Path(folder), rows), fraction, seed)
    assert sorted([*train, *held_out]) == list(range(len(rows)))
    assert not {rows[i] for i in train} & {rows[i] for i in held_out}
    assert len(train) > 0
    assert (len(held_out) > 0) == (fraction > 0 and len(set(rows)) > 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_split_refuses_a_fraction_outside_its_range(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError):
        split_corpus(_corpus(tmp_path, ["a"]), fraction, 0)


# -- groups ------------------------------------------------------------------------------------------------------------


def test_groups_of_every_format_are_those_of_the_rows_by_number(tmp_path: Path) -> None:
    rows = [{"text": "one", "ward": "north"}, {"text": "two", "ward": "south"}, {"text": "three", "ward": "north"}]
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    write(tmp_path / "b.csv", "Text,ward\n" + "\n".join(f"{row['text']},{row['ward']}" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        assert read_groups(tmp_path / name, "ward") == ["north", "south", "north"]
    assert len(read_groups(tmp_path, "ward")) == len(open_corpus(tmp_path)) == 9


def test_groups_pass_over_bad_rows_as_the_corpus_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "", "ward": 1}\n{"text": "fine", "ward": 2}\n')
    assert read_groups(path, "ward") == ["2"]
    assert len(open_corpus(path, skip_bad=True)) == 1


@pytest.mark.parametrize("row", ['{"text": "SECRET"}', '{"text": "SECRET", "ward": ["SECRET"]}'])
def test_row_without_its_group_is_refused_with_its_place_and_not_its_text(tmp_path: Path, row: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine", "ward": "north"}\n' + row)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 does not say its 'ward'") as refused:
        read_groups(path, "ward")
    assert "SECRET" not in str(refused.value)


def test_columns_that_exist_are_named_where_the_group_does_not(tmp_path: Path) -> None:
    row = {"text": "SECRET", "Ward": "north", "age": 7}
    write(tmp_path / "a.jsonl", json.dumps(row))
    write(tmp_path / "b.csv", "text,Ward,age\nSECRET,north,7")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        with pytest.raises(DataError, match="does not say its 'ward'") as refused:
            read_groups(tmp_path / name, "ward")
        assert "there are text, Ward, age" in refused.value.remedy
