"""Tables as files, and the settings beside them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from rlhf.errors import UserError
from rlhf.evaluation.tables import claim, notes_of, owned_table, parts_of, read_table, write_notes, write_table

AWKWARD = [
    "",
    "NA",
    "null",
    " leading",
    'quoted "text", with\nlines',
    "a\r\nb",
    "a\rb",
    "caf\u00e9 \u2603",
    "1.50",
    "True",
]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({
        "id": [f"0{n}" for n in range(len(AWKWARD))], "query": [f"q{n}" for n in range(len(AWKWARD))],
        "response": AWKWARD, "tokens": range(len(AWKWARD)), "has_eos": [True, False] * 5,
        "score": [0.1 + 0.2, float("nan"), 1e-300, *[1 / 3] * 7],
    })  # fmt: skip
    write_table(table, tmp_path / "folder" / f"t{suffix}")
    pd.testing.assert_frame_equal(read_table(tmp_path / "folder" / f"t{suffix}", "a.table"), table, check_exact=True)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == [f"t{suffix}"]


def test_bad_tables_get_one_sentence(tmp_path: Path) -> None:
    def refused(path: Path, needed: tuple[str, ...] = ("query", "response")) -> str:
        with pytest.raises(UserError) as error:
            read_table(path, "a.table", needed)
        return str(error.value)

    assert refused(tmp_path / "none.csv") == f"a.table: there is no table {tmp_path}/none.csv."
    assert "must end in .parquet or .csv" in refused(tmp_path / "none.txt")
    for name, content, sentence in (
        ("bad.parquet", b"no table", "bad.parquet cannot be read as a table: Could not open Parquet"),
        ("bad.csv", b"", "bad.csv is empty."),
        ("latin1.csv", b"query,response\na,caf\xe9\n", "latin1.csv, line 2 is not UTF-8 (byte 0xe9 in column 6)"),
        ("quote.csv", b'query,response\n"a,b\n', "quote.csv, line 2 opens a quote that is never closed."),
    ):
        (tmp_path / name).write_bytes(content)
        assert sentence in refused(tmp_path / name)
    write_table(pd.DataFrame({"query": ["x", "y", "x", "x"], "response": list("abcd")}), tmp_path / "twice.csv")
    assert "2 rows with the query of an earlier row, the first is row 3" in refused(tmp_path / "twice.csv")
    assert len(read_table(tmp_path / "twice.csv", "a.table", ("response",))) == 4
    assert "twice.csv lacks score; it has query, response." in refused(tmp_path / "twice.csv", ("score",))
    write_table(pd.DataFrame({"query": [], "response": []}), tmp_path / "empty.parquet")
    assert "has no rows" in refused(tmp_path / "empty.parquet")


def test_a_place_belongs_to_one_set_of_settings(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "t.parquet"
    settings = {"temperature": 0.01, "seed": (1, 2)}
    assert not claim(output, settings)
    assert not claim(output, {"temperature": 0.7})  # nothing is lost
    assert not claim(output, settings)
    parts_of(output).mkdir()
    with pytest.raises(UserError, match=r"temperature: 0.01 before, 0.7 now, seed: \[1, 2\] before, null now"):
        claim(output, {"temperature": 0.7})
    assert not claim(output, settings)
    write_table(pd.DataFrame({"x": [1]}), output)
    assert claim(output, settings)
    with pytest.raises(UserError, match="is a table made with other settings"):
        claim(output, {"temperature": 0.7})
    notes_of(output).unlink()
    with pytest.raises(UserError, match="the file with its settings is missing"):
        claim(output, settings)
    write_notes(output, {"settings": {"temperature": 0.01, "seed": [1, 2]}})
    assert claim(output, settings)


def test_a_place_that_can_not_be_written() -> None:
    with pytest.raises(UserError, match=r"output: .* must end in"), owned_table("t.txt"):
        pass
    with (
        pytest.raises(UserError, match="output: the folder /proc/nowhere cannot be created"),
        owned_table("/proc/nowhere/t.csv"),
    ):
        pass
