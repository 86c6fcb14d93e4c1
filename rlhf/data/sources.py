"""Records from the hub, a local folder, or JSONL, Parquet and CSV files."""

from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets import Dataset
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from rlhf.errors import UserError

Schemas = dict[str, tuple[str, ...]]  # name of a schema -> the columns that its records need

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, config=ConfigDict(title="source"))
class Source:
    """Where records come from.

    Attributes:
        path: a JSONL, Parquet or CSV file; a folder with files named after the split (`train.jsonl`,
            `validation-0001.parquet`) or written by `Dataset.save_to_disk`; or the name of a dataset on the hub.
        split: split of the folder or dataset.
        name: configuration of a hub dataset (`comparisons`).
        revision: git revision of a hub dataset.
        columns: our column name -> its name in the data, for example `{prompt: question}`.
        limit: use only this many records, the first ones.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    limit: PositiveInt | None = None


def load_records(source: Source, setting: str) -> Dataset:
    """Loads the records of a source and renames their columns; `setting` is how the user names it, for messages."""
    dataset = _load(source, setting)
    for ours, theirs in (source.columns or {}).items():
        if theirs not in dataset.column_names:
            raise UserError(
                f"{setting}.columns: {source.path} has no column {theirs!r}; it has {_names(dataset.column_names)}."
            )
        if ours != theirs:
            if ours in dataset.column_names:
                raise UserError(f"{setting}.columns: {source.path} already has a column {ours!r}.")
            dataset = dataset.rename_column(theirs, ours)
    if len(dataset) == 0:
        raise UserError(f"{setting}: {source.path} ({source.split}) is empty.")
    return dataset if source.limit is None else dataset.select(range(min(source.limit, len(dataset))))


def find_columns(dataset: Dataset, choices: Schemas, setting: str, path: str) -> str:
    """Returns the name of the first schema that a dataset has the columns of."""
    for schema, needed in choices.items():
        if set(needed) <= set(dataset.column_names):
            return schema
    wanted = " or ".join(_names(needed) for needed in choices.values())
    raise UserError(
        f"{setting}: {path} has the columns {_names(dataset.column_names)}, but needs {wanted}; "
        f"rename columns with {setting}.columns."
    )


def _load(source: Source, setting: str) -> Dataset:
    path = Path(source.path).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, Dataset):
                return saved
            if source.split not in saved:
                raise UserError(f"{setting}: {path} has no split {source.split!r}; it has {_names(saved)}.")
            return saved[source.split]
        if path.exists() or path.suffix in READERS:
            files = _files(path, source.split, setting)
            reader = READERS[files[0].suffix]
            return datasets.load_dataset(reader, data_files=[str(f) for f in files], split="train")
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        if "scripts are no longer supported" in reason:
            reason += f"; set {setting}.revision to refs/convert/parquet"
        raise UserError(f"{setting}: {source.path} ({source.split}) cannot be read: {reason}") from error


def _files(path: Path, split: str, setting: str) -> list[Path]:
    files = [path]
    if path.is_dir():
        there = [f for f in sorted(path.iterdir()) if f.suffix in READERS]
        files = [f for f in there if f.stem == split or f.stem.startswith(f"{split}-")]
        if not files:
            found = _names(f.name for f in there)
            raise UserError(f"{setting}: {path} has no {split}.jsonl, .parquet or .csv; it has {found}.")
        if len({f.suffix for f in files}) > 1:
            raise UserError(f"{setting}: {path} has {_names(f.name for f in files)}; keep one format per split.")
    for file in files:
        if not file.is_file():
            raise UserError(f"{setting}: there is no file {file}.")
        if file.stat().st_size == 0:
            raise UserError(f"{setting}: {file} is empty.")
        if file.suffix not in READERS:
            raise UserError(f"{setting}: {file} is none of {_names(READERS)}.")
    return files


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
