"""Records from JSON, CSV and TSV files, compressed or not, exactly as they stand there.

Whatever is wrong is named by its line. A file is read twice: for the types of its columns, and to write them to the
cache of `datasets`, a thousand records at a time.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Json

from rlhf.errors import UserError
from rlhf.files import fingerprint

Record = dict[str, Any]

JSON, TABLES = (".jsonl", ".json"), {".csv": ",", ".tsv": "\t"}
KINDS = (*JSON, *TABLES, ".parquet")
_OPEN: dict[str, Callable[[Path], Any]] = {
    "": lambda file: file.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pa.input_stream(str(file), compression="zstd")),
}
_CHUNK = 1000  # records in memory at a time
_VERSION = 2  # part of the cache key: raise it when other records come out
_LONGEST_CELL = 2**31 - 1  # of a CSV file, in characters
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # maybe half of a character
_LONG_NUMBER = re.compile(r"\d{19}")
_INT64 = range(-(2**63), 2**63)


class FileName(NamedTuple):
    """The parts of a name such as `train-0001.jsonl.gz`."""

    stem: str
    kind: str  # one of KINDS; empty if it is none
    compression: str


def parse_name(file: Path) -> FileName:
    """Splits the name of a file into its parts."""
    compression = file.suffix if file.suffix in _OPEN else ""
    name = Path(file.name.removesuffix(compression))
    known = name.suffix in KINDS and not (compression and name.suffix == ".parquet")
    return FileName(name.stem, name.suffix if known else "", compression)


def read_files(files: Sequence[Path], field: str | None, setting: str, limit: int | None = None) -> Dataset:
    """Reads JSON, CSV and TSV files as one dataset; what was read once comes from the cache of `datasets`.

    Columns that a record lacks are None. A column with values of several kinds, such as numbers and texts, keeps each.

    Args:
        field: where the list of records is in a JSON file that is one object.
        setting: how the user names the files, for messages.
        limit: read only this many records, the first ones.
    """
    stats = [(str(file.resolve()), file.stat()) for file in files]
    known = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    key = fingerprint([str(_VERSION), field or "", *known, *([] if limit is None else [str(limit)])])
    target = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf" / f"records-{key}.arrow"
    if not target.is_file():
        schema = _features(_chunks(files, field, setting, limit)).arrow_schema
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{uuid.uuid4().hex}")  # another process may write the same
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
                for chunk in _chunks(files, field, setting, limit):
                    columns = [_array([record.get(f.name) for record in chunk], f.type) for f in schema]
                    stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return Dataset.from_file(str(target))


def _chunks(files: Sequence[Path], field: str | None, setting: str, limit: int | None) -> Iterator[list[Record]]:
    records = islice(chain.from_iterable(_records(file, field, setting) for file in files), limit)
    while chunk := list(islice(records, _CHUNK)):
        yield chunk


# ---------------------------------------------------------------------------------------------------------- types


def _features(chunks: Iterator[list[Record]]) -> Features:
    """Finds the types of all columns; those of several types are kept as JSON."""
    types: dict[str, pa.DataType | None] = {}
    for chunk in chunks:
        for name in dict.fromkeys(chain.from_iterable(chunk)):
            types[name] = _common(types.get(name, pa.null()), [record.get(name) for record in chunk])
    plain = Features.from_arrow_schema(pa.schema([(name, kind or pa.null()) for name, kind in types.items()]))
    return Features({name: plain[name] if kind else Json() for name, kind in types.items()})


def _common(known: pa.DataType | None, values: list[Any]) -> pa.DataType | None:
    """Returns a type that gives earlier values and these back as they are; None if there is none."""
    if known is None:
        return None
    try:
        array = pa.array(values)
        both = [pa.schema([("x", known)]), pa.schema([("x", array.type)])]
        common = pa.unify_schemas(both, promote_options="permissive").field("x").type
    except (pa.ArrowException, OverflowError):
        return None
    if not pa.types.is_nested(common):
        return common
    same_form = pa.types.is_null(known) or _form(known) == _form(common)  # else None would fill what they lack
    return common if same_form and array.to_pylist() == values else None


def _form(kind: pa.DataType) -> Any:
    """Returns the names inside of a nested type."""
    if pa.types.is_struct(kind):
        return {field.name: _form(field.type) for field in kind}
    return [_form(kind.value_type)] if pa.types.is_list(kind) else None


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        texts = [None if value is None else _json_text(value) for value in values]
        return pa.ExtensionArray.from_storage(kind, pa.array(texts, pa.string()))
    if pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, kind)


def _json_text(value: Any) -> str:
    """Writes a value as JSON that `datasets` can read, which has no integers beyond 64 bits."""
    text = json.dumps(value)
    if _LONG_NUMBER.search(text):
        text = json.dumps(json.loads(text, parse_int=lambda digits: int(digits) if int(digits) in _INT64 else digits))
    return text


# --------------------------------------------------------------------------------------------------------- records


def _records(file: Path, field: str | None, setting: str) -> Iterator[Record]:
    kind = parse_name(file).kind
    return _table(file, TABLES[kind], setting) if kind in TABLES else _json(file, field, setting)


def _lines(file: Path, setting: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 file."""
    try:
        with _OPEN[parse_name(file).compression](file) as stream:
            for number, line in enumerate(stream, 1):
                where = f"{setting}: {file}, line {number}"
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise UserError(f"{where} is UTF-16; save the file as UTF-8.")
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{error.object[error.start]:02x} in column {error.start + 1}"
                    advice = "if it is Latin-1, convert the file with `iconv -f latin1 -t utf-8`"
                    raise UserError(f"{where} is not UTF-8 ({byte}); {advice}.") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{setting}: {file} cannot be read: {error}") from error


def _json(file: Path, field: str | None, setting: str) -> Iterator[Record]:
    """Yields the records of a file of JSON lines, or of one JSON list or object."""
    where = f"{setting}: {file}"
    lines = enumerate(_lines(file, setting), 1)
    start, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    named_as_lines = parse_name(file).kind == ".jsonl" and not first.lstrip().startswith("[")
    if field is None and (named_as_lines or _is_json(first)):
        for number, line in chain([(start, first)], lines):
            if line.strip():
                yield _record(_parsed(line, number, where), _HALF.search(line), f"{where}, line {number}")
        return
    text = "".join([first, *(line for _, line in lines)])
    document, halves = _parsed(text, start, where), _HALF.search(text)
    for name in field.split(".") if field else ():
        if not isinstance(document, dict) or name not in document:
            has = f"it has {', '.join(document)}" if isinstance(document, dict) else f"it is {_kind(document)}"
            raise UserError(f"{setting}.field: {file} has no {name!r}; {has}.")
        document = document[name]
    if field and not isinstance(document, list):
        raise UserError(f"{setting}.field: {field} in {file} is {_kind(document)}, and no list of records.")
    for number, value in enumerate(document if isinstance(document, list) else [document], 1):
        yield _record(value, halves, f"{where}, record {number} (counting from 1)")


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    """Makes an object of JSON, of which Python would keep the last value of a key that stands twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return made


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _parsed(text: str, line: int, where: str) -> Any:
    """Parses a text that begins in a line of a file."""
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1} is not JSON ({error.msg} in column {error.colno})"
        raise UserError(f"{where}, {place}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}, what begins in line {line} cannot be read: {error}.") from error


def _record(value: Any, halves: object, where: str) -> Record:
    """Returns a record, unless it is none; with `halves`, there may be half characters in it."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {_kind(value)}, and no object with named columns.")
    try:
        if halves:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise UserError(
            f"{where} has half of a character ({half} without its other half); correct or remove it."
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _table(file: Path, delimiter: str, setting: str) -> Iterator[Record]:
    """Yields the rows of a CSV or TSV file; every cell is a text."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(_lines(file, setting), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        where = f"{setting}: {file}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            reason = (
                "opens a quote that is never closed"
                if str(error) == "unexpected end of data"
                else f"is broken: {error}"
            )
            raise UserError(f"{where} {reason}.") from error
        if row is None:
            return
        if row and not names:
            names = [name.strip() for name in row]
            if twice := [name for name in dict.fromkeys(filter(None, names)) if names.count(name) > 1]:
                raise UserError(f"{where}: the column {twice[0]!r} is there {names.count(twice[0])} times; keep one.")
        elif row:
            if len(row) != len(names):
                raise UserError(
                    f"{where} has {len(row)} cells for {len(names)} columns; are all commas in texts quoted?"
                )
            yield {name: cell for name, cell in zip(names, row, strict=True) if name}
