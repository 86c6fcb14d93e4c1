"""Records from the hub, a local folder, or JSON, CSV, TSV and Parquet files."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, Features, Json
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from rlhf.data.readers import JSON, KINDS, parse_name, read_files
from rlhf.errors import Fraction, UserError

Schemas = dict[str, tuple[str, ...]]  # name of a schema -> the columns that its records need


@dataclass(frozen=True, config=ConfigDict(title="source"))
class Source:
    """Where records come from.

    Attributes:
        path: a JSONL, JSON, CSV or TSV file, also compressed (`.gz`, `.bz2`, `.xz`, `.zst`), or a Parquet file; a
            folder with files named after the split (`train.jsonl`, `data/validation-0001.parquet`) or written by
            `Dataset.save_to_disk`; or the name of a dataset on the hub.
        split: split of the folder or dataset.
        name: configuration of a hub dataset (`comparisons`), or a folder inside of the folder.
        revision: git revision of a hub dataset.
        field: where the list of records is in a JSON file that is one object, for example `data`.
        columns: our column name -> its name in the data, for example `{prompt: question}`, or `{prompt: data.question}`
            inside of another column.
        part: use only the records whose query falls into this part of [0, 1], by a hash: `[0, 0.05]` of one source and
            `[0.05, 1]` of another share out the queries, the same ones in every file.
        part_seed: another seed shares them out in another way.
        limit: use only this many records, the first ones.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    field: str | None = None
    columns: dict[str, str] | None = None
    part: tuple[Fraction, Fraction] | None = None
    part_seed: int = 0
    limit: PositiveInt | None = None

    def has(self, query: str) -> bool:
        """Tells whether a query belongs to its part."""
        digest = hashlib.sha256(f"{self.part_seed}\n{query}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return self.part is None or self.part[0] <= place < self.part[1]


def load_records(source: Source, setting: str) -> Dataset:
    """Loads the records of a source and renames their columns; `setting` is how the user names it, for messages."""
    if source.part is not None:
        source = replace(source, limit=None)  # it is of the part, which is not known before the queries are
    dataset = _load(source, setting)
    if len(dataset) == 0:
        raise UserError(f"{setting}: {source.path} ({source.split}) is empty.")
    if source.limit is not None:
        dataset = dataset.select(range(min(source.limit, len(dataset))))
    for ours, theirs in (source.columns or {}).items():
        where = f"{setting}.columns: {source.path}"
        feature = None if theirs in dataset.column_names else _inner_feature(dataset, theirs, where)
        if ours != theirs and ours in dataset.column_names:
            raise UserError(f"{where} already has a column {ours!r}.")
        if feature is not None:
            dataset = _with_inner_column(dataset, ours, theirs, feature)
        elif ours != theirs:
            dataset = dataset.rename_column(theirs, ours)
    return dataset


def find_columns(dataset: Dataset, choices: Schemas, setting: str, path: str) -> str:
    """Returns the name of the first schema that a dataset has the columns of."""
    there = dataset.column_names
    for schema, needed in choices.items():
        if set(needed) <= set(there):
            return schema
    wanted = ", or ".join(" + ".join(needed) for needed in choices.values())
    advice = _advice(dataset, choices, setting)
    raise UserError(f"{setting}: {path} has the columns {_names(there)}, but needs {wanted}{advice}.")


def _advice(dataset: Dataset, choices: Schemas, setting: str) -> str:
    """Says how to come by missing columns; nothing where no setting helps."""
    first = dataset[0] if len(dataset) else {}
    for name, value in first.items():
        inside = value[0] if isinstance(value, list) and value else None
        if len(dataset) == 1 and isinstance(inside, dict) and not {"role", "from"} & set(inside):  # no conversation
            return f"; if the records are in {name!r}, set {setting}.field: {name}"
        for needed in choices.values() if isinstance(value, dict) else ():
            if found := [column for column in needed if column in value and column not in first]:
                return f"; take columns out of {name!r} with {setting}.columns: {{{found[0]}: {name}.{found[0]}}}"
    there = set(dataset.column_names)
    enough = any(len(set(needed) - there) <= len(there - set(needed)) for needed in choices.values())
    if not enough:
        return ""
    formats = ", or put them together with data.text.prompt and data.text.completion" if "plain" in choices else ""
    return f"; rename columns with {setting}.columns{formats}"


def _inner_feature(dataset: Dataset, name: str, where: str) -> Any:
    """Returns the type of a column that is inside of another one, such as `data.prompt`."""
    feature: Any = dataset.features
    for part in name.split("."):
        if isinstance(feature, Json):  # every record has a form of its own
            break
        if not isinstance(feature, Mapping) or part not in feature:
            raise UserError(f"{where} has no column {name!r}; it has {_names(dataset.features)}.")
        feature = feature[part]
    return feature


def _with_inner_column(dataset: Dataset, ours: str, theirs: str, feature: Any) -> Dataset:
    column, *path = theirs.split(".")
    dig = partial(_dig, column=column, path=path, ours=ours, as_json=isinstance(feature, Json))
    inner = dataset.select_columns([column]).map(dig, remove_columns=[column], features=Features({ours: feature}))
    return datasets.concatenate_datasets([dataset, inner], axis=1)


def _dig(record: dict[str, Any], column: str, path: list[str], ours: str, as_json: bool) -> dict[str, Any]:
    value = reduce(lambda outer, name: outer.get(name) if isinstance(outer, dict) else None, path, record[column])
    return {ours: json.dumps(value) if as_json else value}  # else the text "2" would become a number


def _load(source: Source, setting: str) -> Dataset:
    path = Path(source.path).expanduser()
    if (path / source.name if source.name else path).is_dir():
        path = path / source.name if source.name else path
    local = path.exists() or parse_name(path).kind
    try:
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, Dataset):
                return saved
            if source.split not in saved:
                raise UserError(f"{setting}: {path} has no split {source.split!r}; it has {_names(saved)}.")
            return saved[source.split]
        files = _files(path, source.split, setting) if local else []
        if source.field is not None and (not files or parse_name(files[0]).kind not in JSON):
            raise UserError(f"{setting}.field is for JSON files, and {source.path} is none.")
        if not files:
            return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
        if files[0].suffix == ".parquet":
            return _read_parquet(files, setting)
        return read_files(files, source.field, setting, source.limit)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        if "scripts are no longer supported" in reason:
            reason += f"; set {setting}.revision to refs/convert/parquet"
        raise UserError(f"{setting}: {source.path} ({source.split}) cannot be read: {reason}") from error


def _read_parquet(files: Sequence[Path], setting: str) -> Dataset:
    """Reads Parquet files, also such as differ in columns: a type that all can have, a text if there is none."""
    schemas = []
    for file in files:
        try:
            schemas.append(pa.parquet.read_schema(file))
        except (OSError, ValueError) as error:
            raise UserError(f"{setting}: {file} cannot be read: {error}") from error
    if all(schema.equals(schemas[0]) for schema in schemas):
        return _parquet(files)
    parts = [_parquet([file]) for file in files]
    for name in dict.fromkeys(name for schema in schemas for name in schema.names):
        kinds = [schema.field(name).type for schema in schemas if name in schema.names]
        try:
            both = pa.unify_schemas([pa.schema([(name, kind)]) for kind in kinds], promote_options="permissive")
        except pa.ArrowTypeError:
            if any(pa.types.is_nested(kind) for kind in kinds):
                raise UserError(f"{setting}: the files of {files[0].parent} differ in the form of {name!r}.") from None
            both = pa.schema([(name, pa.string())])
        feature = Features.from_arrow_schema(both)[name]
        parts = [part.cast_column(name, feature) if name in part.column_names else part for part in parts]
    return datasets.concatenate_datasets(parts)


def _parquet(files: Sequence[Path]) -> Dataset:
    return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")


def _files(path: Path, split: str, setting: str) -> list[Path]:
    """Finds the files of a split: in a folder, in `data` inside of it, or in a folder named after the split."""
    files = [path]
    if path.is_dir():
        there = [f for folder in (path, path / "data") if folder.is_dir() for f in sorted(folder.iterdir())]
        there = [f for f in there if parse_name(f).kind]
        files = [f for f in there if (stem := parse_name(f).stem) == split or stem.startswith(f"{split}-")]
        if not files and (path / split).is_dir():
            files = [f for f in sorted((path / split).iterdir()) if parse_name(f).kind]
        if not files:
            found = _names(f.name for f in there)
            raise UserError(f"{setting}: {path} has no {split}.jsonl or other file of that name; it has {found}.")
        if len({parse_name(f)[1:] for f in files}) > 1 or len({f.parent for f in files}) > 1:
            names = _names(str(f.relative_to(path)) for f in files)
            raise UserError(f"{setting}: {path} has {names}; keep one format per split.")
    for file in files:
        if not file.is_file():
            raise UserError(f"{setting}: there is no file {file}.")
        if not parse_name(file).kind:
            raise UserError(f"{setting}: {file} is none of {_names(KINDS)}.")
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{setting}: {files[0]} is empty.")
    return files


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
