"""Records come out of JSON, CSV and TSV files exactly as they stand there; what is wrong is named by its line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf.data import readers
from rlhf.data.readers import parse_name, read_files
from rlhf.errors import UserError

ROWS = [{"prompt": "é", "completion": " b"}, {"prompt": "c", "completion": ""}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(file: Path, content: str | bytes, field: str | None = None) -> list[dict[str, Any]]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return [*read_files([file], field, "data.train")]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_compressed_files_are_read(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], kind: str) -> None:
    text = TEXT
    if kind in (".csv", ".tsv"):
        delimiter = "," if kind == ".csv" else "\t"
        text = "".join(delimiter.join(row) + "\n" for row in [list(ROWS[0]), *(row.values() for row in ROWS)])
    parts = text.encode()[:20], text.encode()[20:]  # two compressed files, one after the other, are one
    assert read(tmp_path / f"a{kind}{suffix}", compress(parts[0]) + compress(parts[1])) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_what_is_not_compressed_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.train: .*a\.jsonl{suffix} cannot be read: "):
        read(tmp_path / f"a.jsonl{suffix}", TEXT)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_a_download_that_broke_off_is_refused(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl{suffix} cannot be read: "):
        read(tmp_path / f"a.jsonl{suffix}", compress(TEXT.encode() * 99)[:-9])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train-0001.jsonl.gz", ("train-0001", ".jsonl", ".gz")),
        ("v1.2.csv", ("v1.2", ".csv", "")),
        ("a.parquet.gz", ("a", "", ".gz")),
        ("owner/name", ("name", "", "")),
        ("a.txt", ("a", "", "")),
    ],
)
def test_a_name_has_parts(name: str, parts: tuple[str, str, str]) -> None:
    assert parse_name(Path(name)) == parts


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
@pytest.mark.parametrize(
    "text",
    [
        TEXT, TEXT.rstrip(), TEXT.replace("\n", "\r\n"), "\n\n" + TEXT.replace("\n", "\n\n"), json.dumps(ROWS),
        json.dumps(ROWS, indent=2), codecs.BOM_UTF8.decode() + TEXT, "\n " + json.dumps(ROWS),
    ],
)  # fmt: skip
def test_json_lists_and_lines_are_the_same(tmp_path: Path, kind: str, text: str) -> None:
    assert read(tmp_path / f"a{kind}", text) == ROWS


def test_one_object_is_one_record(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", json.dumps(ROWS[0], indent=2)) == ROWS[:1]


def test_the_records_of_a_field(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", json.dumps({"x": 1, "data": ROWS}), "data") == ROWS
    assert read(tmp_path / "b.json", json.dumps({"x": {"y": ROWS}}, indent=1), "x.y") == ROWS


@pytest.mark.parametrize(
    "value", ["2024-01-01", "12:30", "None", "null", "NA", "true", " 1 ", "", "😀", "\u2028", "a\nb", "\x00"]
)
def test_a_text_stays_a_text(tmp_path: Path, value: str) -> None:
    assert read(tmp_path / "a.jsonl", json.dumps({"prompt": value}) + "\n") == [{"prompt": value}]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2], [1, 0.5], [True, None], [1, "1"], [True, 1], [True, "true"], ["1", ["1"]], [{"a": 1}, {"a": "1"}],
        [{"a": 1}, {"a": {"b": 1}}], [2**70, 1], [[1], ["a"]], [1e300, None], ["{}", {}],
    ],
)  # fmt: skip
@pytest.mark.parametrize("between", [0, 1500])  # more than are held in memory at a time
def test_values_of_any_type_stand_in_one_column(tmp_path: Path, values: list[Any], between: int) -> None:
    column = [values[0], *[None] * between, *values[1:]]
    records = read(tmp_path / "a.jsonl", "".join(json.dumps({"p": "a", "x": value}) + "\n" for value in column))
    found = [record["x"] for record in records]
    if values[0] == 2**70:
        assert found == [str(2**70), *[None] * between, 1]  # 64 bits are the most
    else:
        assert found == column
        assert [type(value) for value in found] == [type(value) for value in column] or values == [1, 0.5]


@pytest.mark.parametrize("between", [0, 1500])
def test_values_of_unlike_form_keep_it(tmp_path: Path, between: int) -> None:
    """None for what a value lacks would get into chat templates and into the records of reward functions."""
    calls = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b", "tool_calls": ["c"]}]
    column = [calls[0], *[calls[0]] * between, calls[1], [], None]
    records = read(tmp_path / "a.jsonl", "".join(json.dumps({"x": value}) + "\n" for value in column))
    assert [record["x"] for record in records] == column


def test_columns_that_a_record_lacks_are_none(tmp_path: Path) -> None:
    rows = [{"a": 1}, *[{}] * 1200, {"b": [{"c": "d"}]}]
    records = read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert records[0] == {"a": 1, "b": None}
    assert records[-1] == {"a": None, "b": [{"c": "d"}]}


CELLS = [
    "2",
    "1.5",
    "True",
    "None",
    "null",
    "NA",
    "",
    " a",
    "b ",
    "2024-01-01",
    "007",
    'say "so"',
    "a,b\tc",
    "x\ny",
    "1e5",
]


@pytest.mark.parametrize(("kind", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cells_are_texts(tmp_path: Path, kind: str, delimiter: str, end: str) -> None:
    quoted = ['"' + cell.replace('"', '""') + '"' if set(cell) & set('",\t\n') else cell for cell in CELLS]
    text = end.join(delimiter.join(row) for row in [["prompt", "x"], *([cell, "1"] for cell in quoted)])
    assert [row["prompt"] for row in read(tmp_path / f"a{kind}", codecs.BOM_UTF8 + text.encode())] == CELLS


def test_a_column_without_a_name_is_no_column(tmp_path: Path) -> None:
    text = ",prompt , completion,,\n0,a,b,,\n\n1,c,d,,\n"
    expected = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert read(tmp_path / "a.csv", text) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a" 1}\n', r"line 3 is not JSON \(Expecting ':' delimiter in column 6\)"),
        ("a.jsonl", '{"a" 1}\n{"a": 1}\n', "line 1 is not JSON"),
        ("a.json", '{"a": 1}\n{"a" 1}\n', "line 2 is not JSON"),
        ("a.json", '\n[{"a": 1},\n {"a" 1}]', "line 3 is not JSON"),
        ("a.jsonl", '{"a": 1}\n{"a": ', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is a list, and no object with named columns"),
        ("a.json", '["x", "y"]', r"record 1 \(counting from 1\) is a text, and no object"),
        ("a.json", '[{"a": 1}, null]', r"record 2 \(counting from 1\) is null, and no object"),
        ("a.jsonl", '{"a": "x"}\n{"a": "\\ud83d!"}\n', r"line 2 has half of a character \(\\ud83d without"),
        ("a.json", '[{"a": "x"}, {"a": ["\\udc00"]}]', r"record 2 \(counting from 1\) has half of a character"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', r"line 2 is not UTF-8 \(byte 0xe9 in column 11\).*iconv"),
        ("a.csv", b"a,b\nx,y\ncaf\xe9,y\n", r"line 3 is not UTF-8 \(byte 0xe9 in column 4\)"),
        ("a.csv", "a,b\nx,y\n".encode("utf-16"), "line 1 is UTF-16; save the file as UTF-8"),
        ("a.jsonl", gzip.compress(TEXT.encode(), mtime=0), "line 1 is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 1}\n', "what begins in line 2 .* the key 'a' stands in it twice"),
        ("a.json", '{"b": {"a": 1, "a": 2}}', "what begins in line 1 .* the key 'a' stands in it twice"),
        ("a.jsonl", "[" * 100_000, "what begins in line 1 cannot be read: maximum recursion depth"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "what begins in line 1 cannot be read: Exceeds the limit"),
        ("a.csv", "a,b,a\n1,2,3\n", "line 1: the column 'a' is there 2 times"),
        ("a.csv", 'a,b\nw,"x\ny"\n"A:, b\nC:, d\n', "line 4 opens a quote that is never closed"),
        ("a.csv", 'a,b\n"A:, b\nC:, "d"\n', "line 2 is broken"),
        ("a.csv", 'a,b\n"x\ny",1\n1\n', "line 4 has 1 cells for 2 columns"),
        ("a.csv", "a,b\n1,2,3\n", "line 2 has 3 cells for 2 columns"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | bytes, message: str
) -> None:
    monkeypatch.setattr(readers.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match=rf"^data\.train: .*{name}, {message}"):
        read(tmp_path / name, content)
    assert not [*tmp_path.glob("cache/*/*")]  # nothing half written


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ({"data": ROWS}, "rows", "has no 'rows'; it has data"),
        ({"data": ROWS}, "data.rows", "has no 'rows'; it is a list"),
        ({"data": 1}, "data", "data in .* is a number, and no list of records"),
        (ROWS, "data", "has no 'data'; it is a list"),
    ],
)
def test_a_field_that_is_not_there_is_named(tmp_path: Path, content: Any, field: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.train\.field: .*{message}"):
        read(tmp_path / "a.json", json.dumps(content), field)


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(tmp_path / "a.jsonl", TEXT)
    monkeypatch.setattr(readers, "_records", lambda *args: pytest.fail("read again"))
    first, second = (read_files([tmp_path / "a.jsonl"], None, "data.train") for _ in range(2))
    assert first._fingerprint == second._fingerprint


def test_a_limit_is_read_alone_and_does_not_stay_in_the_way_of_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "x"}\n{"a": "y"}\n{"a": "z"}\nbroken\n')
    assert read_files([file], None, "data", limit=2)["a"][:] == ["x", "y"]
    assert read_files([file], None, "data", limit=3)["a"][:] == ["x", "y", "z"]
    with pytest.raises(UserError, match="line 4 is not JSON"):
        read_files([file], None, "data")
