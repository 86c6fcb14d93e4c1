"""Tables as files: Parquet or CSV, written whole or not at all, with the settings they were made with beside them."""

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf import files
from rlhf.errors import UserError

SUFFIXES = (".parquet", ".csv")
# Columns of text: in a CSV file an empty text, or the text "NA", is a text and no missing number.
TEXTS = frozenset({
    "id", "query", "response", "reference", "record", "a", "b", "a_name", "b_name", "judge", "a_first", "b_first",
    "split", "batch", "chosen_policy", "rejected_policy",
})  # fmt: skip
_SHOWN = 60  # longest value of a setting in a message


def read_table(path: str | Path, setting: str, needed: Sequence[str] = ()) -> pd.DataFrame:
    """Reads a table with the `needed` columns; if `query` is one of them, no two rows may have the same query.

    Error messages name the table by its `setting`.
    """
    file = Path(path)
    check_suffix(file, setting)
    if not file.is_file():
        raise UserError(f"{setting}: there is no table {file}.")
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else _read_csv(file)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are of these kinds
        if not file.stat().st_size:
            raise UserError(f"{setting}: {file} is empty.") from error
        if file.suffix == ".csv":
            from rlhf.data.readers import read_files

            read_files([file], None, setting)  # says what is wrong in which line, if it finds it too
        raise UserError(f"{setting}: {file} cannot be read as a table: {str(error).strip().splitlines()[0]}") from error
    if missing := [column for column in needed if column not in table]:
        raise UserError(f"{setting}: {file} lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    if table.empty:
        raise UserError(f"{setting}: {file} has no rows.")
    if "query" in needed and (repeated := table["query"].duplicated()).any():
        raise UserError(
            f"{setting}: {file} has {repeated.sum()} rows with the query of an earlier row, the first is row "
            f"{repeated.argmax() + 1} (counting from 1); keep one row per query."
        )
    return table


def _read_csv(file: Path) -> pd.DataFrame:
    columns = pd.read_csv(file, nrows=0).columns
    return pd.read_csv(
        file,
        dtype={name: str for name in columns if name in TEXTS},
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in TEXTS},
        float_precision="round_trip",
    )


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a table, without its index, to a file that ends in .parquet or .csv."""
    file = Path(path)
    check_suffix(file, "output")
    with files.replacing(file) as partial:
        if file.suffix == ".parquet":
            table.to_parquet(partial, index=False)
        else:
            table.to_csv(partial, index=False, quoting=csv.QUOTE_NONNUMERIC)  # else a lone carriage return ends a row


def check_suffix(file: Path, setting: str) -> None:
    """Refuses a file that is named neither as Parquet nor as CSV."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{setting}: {file} must end in {' or '.join(SUFFIXES)}.")


def notes_of(output: Path) -> Path:
    """Returns the file with the settings (and the result) of a table: `<table>.json`."""
    return output.with_name(f"{output.name}{files.NOTES}")


def parts_of(output: Path) -> Path:
    """Returns the folder with the finished parts of an unfinished table: `<table>.parts`."""
    return output.with_name(f"{output.name}{files.PARTS}")


def read_notes(output: Path) -> dict[str, Any]:
    """Reads the notes beside a table; empty if there are none."""
    file = notes_of(output)
    return json.loads(file.read_text()) if file.is_file() else {}


def write_notes(output: Path, notes: Mapping[str, Any]) -> None:
    """Writes the notes beside a table."""
    files.write_text(notes_of(output), json.dumps(notes, indent=2) + "\n")


def owned_table(output: str | Path) -> AbstractContextManager[None]:
    """Keeps other processes from making the same table."""
    check_suffix(Path(output), "output")
    return files.owned(Path(output), "output", beside=True)


def claim(output: Path, settings: Mapping[str, Any], write: bool = True) -> bool:
    """Tells whether an owned table is finished; if not, reserves its place for a new table or for one to resume.

    Of several processes, only the first should `write` the settings and print that a finished table is kept.

    Raises:
        UserError: the place cannot be written, or holds a table, or parts of one, made with other settings.
    """
    now, known = json.loads(json.dumps(settings)), read_notes(output).get("settings")
    finished = output.exists()
    begun = finished or parts_of(output).exists()
    if begun and known != now:
        raise UserError(
            f"output: {output} {'is' if finished else 'holds parts of'} a table made with other settings "
            f"({_difference(known, now)}); choose another output, or delete {output.name}, {notes_of(output).name} and "
            f"{parts_of(output).name}."
        )
    if write and finished:
        print(f"{output} is finished, with these settings; it is kept.")
    if write and not begun:
        write_notes(output, {"settings": now})
    return finished


def _difference(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    if before is None:
        return "the file with its settings is missing"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {_shown(before.get(name))} before, {_shown(now.get(name))} now" for name in names)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
