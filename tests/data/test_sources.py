"""Reading records: file types, folders, splits, column maps, and the sentences for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from rlhf.data.sources import Source, find_columns, load_records
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_comparisons, load_demonstrations
from rlhf.errors import UserError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(4)]
Writer = Callable[[str, Any], str]


def dataset(rows: list[dict[str, Any]] = ROWS) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def jsonl(folder: Path) -> Source:
    dataset().to_json(folder / "a.jsonl")
    return Source(str(folder / "a.jsonl"))


def json_file(folder: Path) -> Source:
    dataset().to_json(folder / "a.json")
    return Source(str(folder / "a.json"))


def parquet(folder: Path) -> Source:
    dataset().to_parquet(folder / "a.parquet")
    return Source(str(folder / "a.parquet"))


def csv(folder: Path) -> Source:
    dataset().to_csv(folder / "a.csv", index=False)
    return Source(str(folder / "a.csv"))


def tsv(folder: Path) -> Source:
    dataset().to_csv(folder / "a.tsv", index=False, sep="\t")
    return Source(str(folder / "a.tsv"))


def wrapped(folder: Path) -> Source:
    (folder / "a.json").write_text(json.dumps({"version": 1, "data": {"rows": ROWS}}, indent=1))
    return Source(str(folder / "a.json"), field="data.rows")


def split_file(folder: Path) -> Source:
    dataset(ROWS[:1]).to_json(folder / "train.jsonl")
    dataset().to_json(folder / "validation.jsonl")
    return Source(str(folder), split="validation")


def split_file_beside_others(folder: Path) -> Source:
    for name in ("train_old", "trainer", "train.old"):
        dataset(ROWS[:1]).to_json(folder / f"{name}.jsonl")
    dataset().to_json(folder / "train.jsonl")
    return Source(str(folder))


def split_shards(folder: Path) -> Source:
    dataset(ROWS[:1]).to_json(folder / "validation.jsonl")
    dataset(ROWS[:3]).to_parquet(folder / "train-00000-of-00002.parquet")
    dataset(ROWS[3:]).to_parquet(folder / "train-00001-of-00002.parquet")
    return Source(str(folder))


def data_folder(folder: Path) -> Source:
    (folder / "data").mkdir()
    dataset(ROWS[:1]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    dataset().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return Source(str(folder))


def folder_of_a_configuration(folder: Path) -> Source:
    (folder / "helpful").mkdir()
    dataset().to_json(folder / "helpful" / "train.jsonl.gz", compression="gzip")
    return Source(str(folder), name="helpful")


def folder_of_a_split(folder: Path) -> Source:
    (folder / "train").mkdir()
    dataset(ROWS[:2]).to_json(folder / "train" / "0.jsonl")
    dataset(ROWS[2:]).to_json(folder / "train" / "1.jsonl")
    return Source(str(folder))


def saved_dataset(folder: Path) -> Source:
    dataset().save_to_disk(folder / "saved")
    return Source(str(folder / "saved"))


def saved_dict(folder: Path) -> Source:
    datasets.DatasetDict(train=dataset(ROWS[:1]), test=dataset()).save_to_disk(folder / "saved")
    return Source(str(folder / "saved"), split="test")


KINDS_OF_SOURCE = [
    jsonl, json_file, wrapped, parquet, csv, tsv, split_file, split_file_beside_others, split_shards, data_folder,
    folder_of_a_configuration, folder_of_a_split, saved_dataset, saved_dict,
]  # fmt: skip


@pytest.mark.parametrize("write", KINDS_OF_SOURCE)
def test_every_kind_of_source_gives_the_same_records(tmp_path: Path, write: Callable[[Path], Source]) -> None:
    assert load_records(write(tmp_path), "data.train").to_list() == ROWS


def test_a_hub_name_is_passed_on_with_its_name_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or dataset())
    source = Source("owner/records", split="validation", name="comparisons", revision="abc")
    assert load_records(source, "data.train").to_list() == ROWS
    assert calls == [(("owner/records", "comparisons"), {"split": "validation", "revision": "abc"})]


@pytest.mark.parametrize(("limit", "rows"), [(1, 1), (3, 3), (4, 4), (9, 4), (None, 4)])
def test_limit_takes_the_first_records(write_jsonl: Writer, limit: int | None, rows: int) -> None:
    source = Source(write_jsonl("a.jsonl", ROWS), limit=limit)
    assert load_records(source, "data.train").to_list() == ROWS[:rows]


def test_columns_are_renamed_to_ours(write_jsonl: Writer) -> None:
    path = write_jsonl("a.jsonl", [{"question": "q", "answer": "a", "prompt_id": 1}])
    source = Source(path, columns={"prompt": "question", "completion": "answer", "prompt_id": "prompt_id"})
    assert load_records(source, "data.train").to_list() == [{"prompt": "q", "completion": "a", "prompt_id": 1}]


def test_a_rename_onto_a_column_that_exists_is_refused_by_name(write_jsonl: Writer) -> None:
    path = write_jsonl("a.jsonl", [{"prompt": "p", "question": "q"}])
    with pytest.raises(UserError, match=r"data\.train\.columns.*prompt"):
        load_records(Source(path, columns={"prompt": "question"}), "data.train")


def test_a_changed_file_is_read_anew(write_jsonl: Writer) -> None:
    load_records(Source(write_jsonl("a.jsonl", ROWS[:2])), "data.train")
    assert load_records(Source(write_jsonl("a.jsonl", ROWS)), "data.train").to_list() == ROWS


def file_with(name: str, content: str) -> Callable[[Path], Source]:
    def write(folder: Path) -> Source:
        (folder / name).write_text(content)
        return Source(str(folder / name))

    return write


def missing(folder: Path) -> Source:
    return Source(str(folder / "a.jsonl"))


def missing_split(folder: Path) -> Source:
    return Source(split_file(folder).path, split="test")


def missing_saved_split(folder: Path) -> Source:
    return Source(saved_dict(folder).path, split="valid")


def wrong_column(folder: Path) -> Source:
    return Source(jsonl(folder).path, columns={"prompt": "question"})


def wrong_inner_column(folder: Path) -> Source:
    dataset([{"data": {"prompt": "p"}}]).to_json(folder / "a.jsonl")
    return Source(str(folder / "a.jsonl"), columns={"prompt": "data.question"})


def field_of_a_table(folder: Path) -> Source:
    return Source(csv(folder).path, field="data")


def two_formats(folder: Path) -> Source:
    dataset().to_json(folder / "train.jsonl")
    dataset().to_json(folder / "train.jsonl.gz", compression="gzip")
    return Source(str(folder))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (missing, r"there is no file .*a\.jsonl"),
        (file_with("a.jsonl", ""), r"a\.jsonl is empty"),
        (file_with("a.jsonl", "\n \n"), r"a\.jsonl \(train\) is empty"),
        (file_with("a.json", "[]"), r"a\.json \(train\) is empty"),
        (file_with("a.csv", "prompt,completion\n"), r"a\.csv \(train\) is empty"),
        (file_with("a.txt", "text"), r"a\.txt is none of \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        (file_with("a.parquet", "text"), r"a\.parquet cannot be read: .*Parquet"),
        (missing_split, r"has no test\.jsonl or other file of that name; it has train\.jsonl, validation\.jsonl"),
        (missing_saved_split, "has no split 'valid'; it has train, test"),
        (field_of_a_table, r"\.field is for JSON files, and .*a\.csv is none"),
        (two_formats, r"has train\.jsonl, train\.jsonl\.gz; keep one format per split"),
        (wrong_inner_column, "has no column 'data.question'; it has data"),
        (wrong_column, "has no column 'question'; it has prompt, completion"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, write: Callable[[Path], Source], message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.train.*{message}"):
        load_records(write(tmp_path), "data.train")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(limit: int) -> None:
    with pytest.raises(ValidationError, match="limit"):
        Source("a.jsonl", limit=limit)


CHOICES = {"tldr": ("post", "summary"), "plain": ("prompt", "completion")}


@pytest.mark.parametrize(
    ("columns", "schema"),
    [
        (["post", "summary", "id"], "tldr"),
        (["completion", "prompt"], "plain"),
        (["prompt", "completion", "post"], "plain"),
        (["prompt", "completion", "post", "summary"], "tldr"),
    ],
)
def test_the_schema_follows_from_the_columns(columns: list[str], schema: str) -> None:
    assert find_columns(dataset([dict.fromkeys(columns, "x")]), CHOICES, "data.train", "a.jsonl") == schema


def test_missing_columns_are_reported_beside_those_that_are_there() -> None:
    there = r"data\.train: a\.jsonl has the columns text, prompt, but needs post \+ summary, or prompt \+ completion"
    with pytest.raises(UserError, match=rf"{there}.*data\.train\.columns"):
        find_columns(dataset([{"text": "x", "prompt": "y"}]), CHOICES, "data.train", "a.jsonl")


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([{"chosen": "a", "rejected": "b"}], None),
        ([{"prompt": "a"}], None),
        (
            [{"question": "a", "answer": "b", "id": 1}],
            "rename columns with data.train.columns, or put them together with data.text.prompt and "
            "data.text.completion",
        ),
        (
            [{"data": {"prompt": "a", "x": 1}, "id": 1}],
            "take columns out of 'data' with data.train.columns: {prompt: data.prompt}",
        ),
        ([{"rows": [{"prompt": "a"}]}], "if the records are in 'rows', set data.train.field: rows"),
        ([{"messages": [{"role": "user", "content": "a"}]}], None),
    ],
)
def test_advice_for_missing_columns_is_given_only_where_it_helps(rows: list[Any], advice: str | None) -> None:
    choices = {"tldr": ("post", "title", "summary"), "plain": ("prompt", "chosen", "rejected")}
    with pytest.raises(UserError) as caught:
        find_columns(dataset(rows), choices, "data.train", "a.jsonl")
    assert str(caught.value).partition("chosen + rejected; ")[2].rstrip(".") == (advice or "")


def test_columns_inside_of_others_are_taken_out(write_jsonl: Writer) -> None:
    rows = [{"data": {"prompt": "a", "more": {"answer": "2"}}, "id": 1}, {"data": {"prompt": "b", "more": None}}]
    columns = {"prompt": "data.prompt", "completion": "data.more.answer", "identity": "id"}
    records = load_records(Source(write_jsonl("a.jsonl", rows), columns=columns), "data.train")
    assert records["prompt"][:] == ["a", "b"]
    assert records["completion"][:] == ["2", None]
    assert records["identity"][:] == [1, None]
    assert records["data"][0] == rows[0]["data"]


def test_columns_are_taken_out_of_records_that_differ_in_form(write_jsonl: Writer) -> None:
    rows = [{"data": {"prompt": "2", "x": 1}}, {"data": {"prompt": "true", "x": "y"}}, {"data": ["no object"]}, {}]
    records = load_records(Source(write_jsonl("a.jsonl", rows), columns={"prompt": "data.prompt"}), "data.train")
    assert records["prompt"][:] == ["2", "true", None, None]
    assert records["data"][:] == [row.get("data") for row in rows]


def parquet_shards(folder: Path, *shards: list[dict[str, Any]]) -> Source:
    for number, rows in enumerate(shards):
        dataset(rows).to_parquet(folder / f"train-{number}.parquet")
    return Source(str(folder))


def json_shards(folder: Path, *shards: list[dict[str, Any]]) -> Source:
    for number, rows in enumerate(shards):
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(folder))


@pytest.mark.parametrize("write", [parquet_shards, json_shards])
def test_files_of_a_folder_may_differ_in_columns(tmp_path: Path, write: Callable[..., Source]) -> None:
    records = load_records(write(tmp_path, [{"prompt": "a", "x": [1]}], [{"y": 0.5, "prompt": "b"}]), "data.train")
    assert records["prompt"][:] == ["a", "b"]
    assert records["x"][:] == [[1], None]
    assert records["y"][:] == [None, 0.5]


@pytest.mark.parametrize("write", [parquet_shards, json_shards])
def test_files_of_a_folder_may_differ_in_types(tmp_path: Path, write: Callable[..., Source]) -> None:
    shards = [[{"prompt": "a", "id": 7, "n": 1}], [{"prompt": "b", "id": "007", "n": 0.5}]]
    records = load_records(write(tmp_path, *shards), "data.train")
    assert records["prompt"][:] == ["a", "b"]
    assert [str(name) for name in records["id"]] == ["7", "007"]
    assert records["n"][:] == [1, 0.5]


def test_parquet_files_that_differ_in_the_form_of_a_column_name_it(tmp_path: Path) -> None:
    source = parquet_shards(tmp_path, [{"prompt": "a"}], [{"prompt": [{"role": "user"}]}])
    with pytest.raises(UserError, match=r"^data\.train: the files of .* differ in the form of 'prompt'"):
        load_records(source, "data.train")


def test_a_hub_data_set_with_a_script_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found summarize_from_feedback.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data\.train\.revision to refs/convert/parquet"):
        load_records(Source("openai/summarize_from_feedback", name="comparisons"), "data.train")


def test_a_hub_data_set_is_asked_for_by_name_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(path: str, name: str | None, **kwargs: object) -> datasets.Dataset:
        asked.update(kwargs, path=path, name=name)
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("openai/summarize_from_feedback", "validation", "comparisons", "refs/convert/parquet")
    assert len(load_records(source, "data.train")) == 1
    assert asked == {
        "path": "openai/summarize_from_feedback", "name": "comparisons", "split": "validation",
        "revision": "refs/convert/parquet",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- parts of the queries


def test_parts_share_out_the_queries_the_same_ones_in_every_file(tokenizer: Any, write_jsonl: Any) -> None:
    prompts = [f"Question {number}?" for number in range(200)]
    file = write_jsonl("sft.jsonl", [{"prompt": p, "completion": " Yes."} for p in prompts])
    pairs = [{"prompt": p, "chosen": " Yes.", "rejected": " No."} for p in prompts for _ in range(2)]
    both = write_jsonl("pairs.jsonl", pairs)

    def queries(load: Any, path: str, part: tuple[float, float], limit: int | None = None) -> list[str]:
        return load(Source(path, part=part, limit=limit), "data.train", tokenizer, TextFormat())["query"][:]

    train, held = (queries(load_demonstrations, file, part) for part in ((0.2, 1.0), (0.0, 0.2)))
    assert sorted(train + held) == sorted(prompts)
    assert 20 <= len(held) <= 60
    assert set(queries(load_comparisons, both, (0.0, 0.2))) == set(held)
    assert queries(load_demonstrations, file, (0.0, 0.2), limit=5) == held[:5]
    with pytest.raises(UserError, match=r"no query of .* falls into the part"):
        queries(load_demonstrations, file, (0.0, 0.0))
