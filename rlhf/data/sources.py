"""Records from the hub, a local folder, or JSONL, Parquet and CSV files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Source:
    """Where records come from.

    Attributes:
        path: a JSONL, Parquet or CSV file; a folder with files named after the split (`train.jsonl`,
            `validation-0001.parquet`) or written by `Dataset.save_to_disk`; or the name of a dataset on the hub.
        split: which split of the folder or dataset.
        name: configuration of a hub dataset (`comparisons`).
        revision: git revision of a hub dataset.
        columns: our column name -> the name it has in the data, for example `{prompt: question}`.
        limit: use the first so many records only.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    limit: int | None = None


def load_records(source: Source, setting: str) -> Dataset:
    """The records of a source, with renamed columns.

    Args:
        setting: how the user names this source, for messages.
    """
    if source.limit is not None and source.limit < 1:
        raise UserError(f"{setting}.limit is {source.limit}; it must be at least 1.")
    dataset = _load(source, setting)
    for ours, theirs in (source.columns or {}).items():
        if theirs not in dataset.column_names:
            raise UserError(
                f"{setting}.columns: {source.path} has no column {theirs!r}; it has {_names(dataset.column_names)}."
            )
        if ours != theirs and ours in dataset.column_names:
            raise UserError(f"{setting}.columns: {source.path} already has a column {ours!r}.")
        if ours != theirs:
            dataset = dataset.rename_column(theirs, ours)
    if len(dataset) == 0:
        raise UserError(f"{setting}: {source.path} ({source.split}) is empty.")
    return dataset if source.limit is None else dataset.select(range(min(source.limit, len(dataset))))


def find_columns(dataset: Dataset, choices: dict[str, tuple[str, ...]], setting: str, path: str) -> str:
    """Which of several record schemas a dataset has.

    Args:
        choices: schema name -> the columns it needs; the first that fits wins.
    """
    for schema, needed in choices.items():
        if set(needed) <= set(dataset.column_names):
            return schema
    wanted = " or ".join(_names(needed) for needed in choices.values())
    raise UserError(
        f"{setting}: {path} has the columns {_names(dataset.column_names)}, but needs {wanted}; "
        f"rename columns with {setting}.columns."
    )


def _load(source: Source, setting: str) -> Dataset:
    import datasets

    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            return _load_folder(path, source, setting)
        if path.is_file() or path.suffix in READERS:
            return _load_files([path], source, setting)
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        if "scripts are no longer supported" in reason:
            reason += f"; set {setting}.revision to refs/convert/parquet"
        raise UserError(f"{setting}: {source.path} ({source.split}) can't be read: {reason}") from error


def _load_folder(folder: Path, source: Source, setting: str) -> Dataset:
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(folder))
        if source.split not in splits:
            raise UserError(f"{setting}: {folder} has no split {source.split!r}; it has {_names(list(splits))}.")
        return splits[source.split]
    if (folder / "dataset_info.json").is_file():
        return datasets.load_from_disk(str(folder))
    files = [f for f in sorted(folder.iterdir()) if f.suffix in READERS]
    chosen = [f for f in files if f.stem == source.split or f.stem.startswith(f"{source.split}-")]
    if len({f.suffix for f in chosen}) > 1:
        raise UserError(f"{setting}: {folder} has {_names([f.name for f in chosen])}; keep one format per split.")
    if not chosen:
        raise UserError(
            f"{setting}: {folder} has no {source.split}.jsonl, .parquet or .csv; "
            f"it has {_names([f.name for f in files])}."
        )
    return _load_files(chosen, source, setting)


def _load_files(files: list[Path], source: Source, setting: str) -> Dataset:
    import datasets

    for file in files:
        if not file.is_file():
            raise UserError(f"{setting}: there is no file {file}.")
        if file.stat().st_size == 0:
            raise UserError(f"{setting}: {file} is empty.")
        if file.suffix not in READERS:
            raise UserError(f"{setting}: {file} is none of {_names(list(READERS))}.")
    reader = READERS[files[0].suffix]
    return datasets.load_dataset(reader, data_files=[str(f) for f in files], split="train")


def _names(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names) if names else "nothing"
