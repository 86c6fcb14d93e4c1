"""Tables as files: Parquet or CSV, written whole or not at all, with the settings they were made with beside them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import files
from rlhf.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".parquet", ".csv")
# Columns of text: in a CSV file an empty text, or the text "NA", is a text and no missing number.
TEXTS = frozenset({
    "id", "query", "response", "reference", "record", "a", "b", "a_name", "b_name", "judge", "a_first", "b_first",
    "split", "batch", "chosen_policy", "rejected_policy",
})  # fmt: skip
_SHOWN = 60  # longest value of a setting in a message


def read_table(path: str | Path, setting: str, needed: Sequence[str] = ()) -> pd.DataFrame:
    """A table from a Parquet or CSV file.

    Args:
        path: the file; its suffix says which of the two.
        setting: how the user names this table, for messages.
        needed: columns that it must have. Where `query` is one of them, no query may stand in two rows.

    Raises:
        UserError: the file is missing, can't be read, is empty, lacks a column, or has a query twice.
    """
    import pandas as pd

    file = Path(path)
    check_suffix(file, setting)
    if not file.is_file():
        raise UserError(f"{setting}: there is no table {file}.")
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else _read_csv(file)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are of these kinds
        raise UserError(f"{setting}: {file} can't be read as a table: {str(error).strip().splitlines()[0]}") from error
    missing = [column for column in needed if column not in table]
    if missing:
        raise UserError(f"{setting}: {file} lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    if table.empty:
        raise UserError(f"{setting}: {file} has no rows.")
    if "query" in needed and table["query"].duplicated().any():
        copies = table["query"][table["query"].duplicated()]
        raise UserError(
            f"{setting}: {file} has {len(copies)} rows with a query that stands in an earlier row, first in row "
            f"{table.index.get_loc(copies.index[0]) + 1}; keep one row per query."
        )
    return table


def _read_csv(file: Path) -> pd.DataFrame:
    import pandas as pd

    columns = pd.read_csv(file, nrows=0).columns
    return pd.read_csv(
        file,
        dtype={name: str for name in columns if name in TEXTS},
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in TEXTS},
        float_precision="round_trip",
    )


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table beside its place, and move it there when it is complete.

    Args:
        table: what to write; its index is left out.
        path: a file that ends in .parquet or .csv; folders on its way are made.
    """
    file = Path(path)
    check_suffix(file, "output")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    if file.suffix == ".parquet":
        table.to_parquet(partial, index=False)
    else:
        table.to_csv(partial, index=False, quoting=csv.QUOTE_NONNUMERIC)  # else a lone carriage return ends a row
    partial.replace(file)


def check_suffix(file: Path, setting: str) -> None:
    """Refuse what is named neither as a Parquet nor as a CSV file."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{setting}: {file} must end in {' or '.join(SUFFIXES)}.")


# --------------------------------------------------------------------------------- a table and its settings


def notes_of(output: Path) -> Path:
    """Where the settings (and the result) of a table stand: `<table>.json`."""
    return output.with_name(f"{output.name}{files.NOTES}")


def parts_of(output: Path) -> Path:
    """Folder of what is done of an unfinished table: `<table>.parts`."""
    return output.with_name(f"{output.name}{files.PARTS}")


def read_notes(output: Path) -> dict[str, Any]:
    """What stands beside a table; nothing where there is nothing."""
    file = notes_of(output)
    return json.loads(file.read_text()) if file.is_file() else {}


def write_notes(output: Path, notes: Mapping[str, Any]) -> None:
    """Write what shall stand beside a table, whole or not at all."""
    file = notes_of(output)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(notes, indent=2) + "\n")
    partial.replace(file)


def claim(output: Path, settings: Mapping[str, Any], write: bool = True) -> bool:
    """Whether a table is finished; otherwise its place is taken, for a new one or for one to go on with.

    Args:
        output: file of the table.
        settings: what the table is made from, as JSON values.
        write: take the place (one process of several does).

    Raises:
        UserError: the place can't be written, or holds a table, or parts of one, made with other settings.
    """
    check_suffix(output, "output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: the folder {output.parent} can't be made: {error.strerror}.") from error
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"output: the folder {output.parent} can't be written.")
    now, known = json.loads(json.dumps(settings)), read_notes(output).get("settings")
    begun = output.exists() or parts_of(output).exists()
    if begun and known != now:
        raise UserError(
            f"output: {output} {'is' if output.exists() else 'holds parts of'} a table made with other settings "
            f"({_difference(known, now)}); choose another output, or delete {output.name}, {notes_of(output).name} and "
            f"{parts_of(output).name}."
        )
    if write and not begun:
        write_notes(output, {"settings": now})
    return output.exists()


def _difference(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    if before is None:
        return "it has none beside it"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {_shown(before.get(name))} before, {_shown(now.get(name))} now" for name in names)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
