"""Responses as a table: the same whatever the batch, the ranks, or when it was killed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli.main import main
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.errors import UserError
from rlhf.evaluation import generate as module
from rlhf.evaluation import resumable
from rlhf.evaluation.generate import generate
from rlhf.evaluation.tables import read_table
from rlhf.synthetic.domains import REDDIT
from rlhf.synthetic.gold_score import gold_score
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parents[2]
COLUMNS = [
    "id", "query", "response", "reference", "tokens", "reference_tokens", "has_eos", "score", "reference_score",
    "gold", "gold_reference", "record",
]  # fmt: skip


@pytest.fixture
def data_path(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl("validation.jsonl", demonstrations(11, 1, "validation"))


@pytest.fixture
def responses(model_path: str, data_path: str, tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Generates a new table of short responses."""
    numbers = count()

    def make(**settings: Any) -> pd.DataFrame:
        defaults = {"model": model_path, "data": Source(data_path), "response_length": 6}
        return generate(f"{tmp_path}/table-{next(numbers)}.parquet", **{**defaults, **settings})

    return make


@pytest.fixture
def words(model_path: str, reward_path: str, data_path: str) -> list[str]:
    return ["generate", f"--model={model_path}", f"--data.path={data_path}", "--response_length=6", "--batch_size=3",
            "--temperature=1.0", f"--reward={reward_path}"]  # fmt: skip


def test_a_row_per_query(reward_path: str, words: list[str], responses: Callable[..., Any], tmp_path: Path) -> None:
    main([*words, f"--output={tmp_path}/out/t.parquet"])
    table = read_table(tmp_path / "out" / "t.parquet", "x", ("query", "response"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["t.parquet", "t.parquet.json"]
    assert list(table) == COLUMNS
    assert table["id"].tolist() == [f"validation-1-{n}" for n in range(11)]
    tokenizer = AutoTokenizer.from_pretrained(reward_path)
    plain = AutoModelForSequenceClassification.from_pretrained(reward_path)
    for row, record in zip(table.itertuples(), demonstrations(11, 1, "validation"), strict=True):
        assert json.loads(row.record) == record
        assert row.reference == " " + record["summary"]
        assert row.gold_reference == gold_score(row.reference, record["facts"], REDDIT.slots).score
        assert row.reference_tokens == min(53, len(tokenizer(row.query + row.reference)["input_ids"])
                                           - len(tokenizer(row.query)["input_ids"]) + 1)  # fmt: skip
        ids = torch.tensor([[*tokenizer(row.query + row.reference)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            reward = plain(ids).logits.item() - plain.config.reward_shift
        assert row.reference_score == pytest.approx(reward, abs=1e-5)
    pd.testing.assert_frame_equal(responses(batch_size=3, temperature=1.0, reward=reward_path), table)


@torch.no_grad()
def test_scores_are_of_the_sampled_tokens_as_they_are_and_of_the_whole_references(
    reward_path: str, responses: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an EOS that was not sampled, and however short `max_response_length` cuts a reference."""
    sampled: list[list[int]] = []
    sample = module.sample

    def listens(model: Any, ids: torch.Tensor, mask: torch.Tensor, *rest: Any) -> Any:
        found = sample(model, ids, mask, *rest)
        sampled.extend([*x[m.bool()].tolist(), *y.tolist()] for x, m, y in zip(ids, mask, found, strict=True))
        return found

    monkeypatch.setattr(module, "sample", listens)
    tokenizer = AutoTokenizer.from_pretrained(reward_path)
    ends = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(range(200, 300))]
    text = TextFormat(max_response_length=5)
    table = responses(reward=reward_path, temperature=1.0, eos_tokens=ends, text=text)
    assert 0 < table["has_eos"].mean() < 1
    plain = AutoModelForSequenceClassification.from_pretrained(reward_path)
    for row, ids in zip(table.itertuples(), sampled, strict=True):
        query = len(tokenizer(row.query)["input_ids"])
        whole = [*tokenizer(row.query + row.reference)["input_ids"], tokenizer.eos_token_id]
        assert row.reference_tokens == 5 < len(whole) - query
        for read, score in ((ids[: query + row.tokens], row.score), (whole, row.reference_score)):
            reward = plain(torch.tensor([read])).logits.item() - plain.config.reward_shift
            assert score == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-5, 1.0])
def test_responses_do_not_depend_on_the_batch(responses: Callable[..., Any], temperature: float) -> None:
    tables = [responses(temperature=temperature, batch_size=n) for n in (2, 11)]
    pd.testing.assert_frame_equal(*tables)
    assert "score" not in tables[0]


def test_each_row_has_random_numbers_of_its_own(responses: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given, sample = [], module.sample

    def listens(model: Any, ids: torch.Tensor, mask: torch.Tensor, numbers: torch.Tensor, decoding: Any) -> Any:
        given.append(numbers)
        return sample(model, ids, mask, numbers, decoding)

    monkeypatch.setattr(module, "sample", listens)
    for seed in (1, 2):
        responses(batch_size=4, seed=seed)
    assert len(torch.cat(given).unique()) == 2 * 11 * 6


def test_another_template_in_the_same_file_is_another_setting(
    chat_path: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    data = Source(write_jsonl("chat.jsonl", [{"prompt": [{"role": "user", "content": "2+2?"}]}]))
    text = TextFormat(chat_template=str(template))
    template.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    generate(f"{tmp_path}/t.csv", chat_path, data, text, 4)
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}")
    with pytest.raises(UserError, match="made with other settings"):
        generate(f"{tmp_path}/t.csv", chat_path, data, text, 4)


def test_a_tokenizer_that_pads_with_eos(model_path: str, responses: Callable[..., Any], tmp_path: Path) -> None:
    folder = shutil.copytree(model_path, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    tables = [responses(model=path) for path in (model_path, str(folder))]
    pd.testing.assert_frame_equal(*tables)


def test_seed_and_temperature_matter(responses: Callable[..., Any]) -> None:
    def texts(**settings: Any) -> list[str]:
        return responses(**settings)["response"].tolist()

    assert texts(temperature=1.0, seed=1) == texts(temperature=1.0, seed=1)
    assert texts(temperature=1.0, seed=1) != texts(temperature=1.0, seed=2)
    assert texts() == texts(seed=1)


def test_two_processes_give_the_table_of_one(
    words: list[str], tmp_path: Path, driver: Callable[..., list[int]]
) -> None:
    main([*words, f"--output={tmp_path}/one.csv"])
    log = tmp_path / "log"
    assert driver([*words, f"--output={tmp_path}/two.csv"], 2, log) == [0, 0], log.read_text()
    assert log.read_text().count("11 responses") == 1
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert not (tmp_path / "two.csv.parts").exists()


@pytest.mark.parametrize("step", ["responses", "scores"])
def test_killed_and_started_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    main([*words, f"--output={tmp_path}/whole.parquet"])
    sampled, written = [], []
    write = resumable.write_table

    def dies(table: pd.DataFrame, path: Path) -> None:
        written.append(path.name)
        write(table, path)
        if written.count(f"{step}-by-3-00001.parquet"):
            raise KeyboardInterrupt

    monkeypatch.setattr(resumable, "write_table", dies)
    output = [f"--output={tmp_path}/killed.parquet"]
    with pytest.raises(SystemExit):
        main([*words, *output])
    monkeypatch.setattr(resumable, "write_table", write)
    (tmp_path / "killed.parquet.parts" / ".partial-responses-by-3-00002.parquet").write_bytes(b"torn")
    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda *args, **kwargs: sampled.append(1) or sample(*args, **kwargs))
    with pytest.raises(SystemExit):
        main([*words, *output, "--temperature=0.5"])
    said = capsys.readouterr().err
    assert "holds parts of a table made with other settings (temperature: 1.0 before, 0.5 now)" in said
    main([*words, *output])
    assert len(sampled) == (2 if step == "responses" else 0)  # two of four parts were there, or all
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_run_that_had_no_memory_goes_on_with_smaller_batches(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main([*words, f"--output={tmp_path}/whole.csv"])
    output = [f"--output={tmp_path}/t.csv"]
    parts = tmp_path / "t.csv.parts"
    make = module.Parts.make

    def dies(self: module.Parts, step: str, *args: Any) -> None:
        make(self, step, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Parts, "make", dies)
        with pytest.raises(SystemExit):
            main([*words, *output])
    assert len(list(parts.iterdir())) == 4
    main([*words, *output, "--batch_size=2"])
    tables = [read_table(tmp_path / name, "x") for name in ("t.csv", "whole.csv")]
    pd.testing.assert_frame_equal(*tables, check_exact=False, atol=1e-5)
    assert not parts.exists()
    main([*words, *output])  # finished, whatever the batch


def test_a_finished_table_is_kept(
    words: list[str], tmp_path: Path, model_path: str, data_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"--output={tmp_path}/t.csv"
    main([*words, output])
    before = (tmp_path / "t.csv").stat().st_mtime_ns
    moved = shutil.copytree(model_path, tmp_path / "copy")
    main([*words, output, f"--model={moved}"])  # the same model in another place
    assert "is finished, with these settings; it is kept" in capsys.readouterr().out
    weights = next(moved.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for change, name in ((f"--model={moved}", "model"), ("--data.limit=5", "data"), ("--seed=2", "seed")):
        with pytest.raises(SystemExit):
            main([*words, output, change])
        assert f"made with other settings ({name}: " in capsys.readouterr().err
    assert (tmp_path / "t.csv").stat().st_mtime_ns == before


def test_records_of_ones_own(
    responses: Callable[..., Any], write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": "How are you?", "id": 7}, {"prompt": "And you?"}, {"prompt": "How are you?"}]
    table = responses(data=Source(write_jsonl("own.jsonl", records)))
    assert table["id"].tolist() == ["7", "1"]
    assert table["reference"].tolist() == ["", ""]
    assert "gold" not in table
    assert "own.jsonl (train) repeat the query of an earlier one; left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--temperature=0"], "temperature.*greater than 0"),
        (["--batch_size=0"], "batch_size.*greater than 0"),
        (["--response_length=0"], "response_length.*greater than 0"),
        (["--response_length=500"], "more than the 512 positions"),
        (["--model=nowhere"], "model: there is no model folder nowhere"),
        (["--model={reward}"], "holds a reward model, not a causal language model"),
        (["--reward={model}"], "not a reward model with one label"),
        (["--data.path=nowhere.jsonl"], "data: there is no file nowhere.jsonl"),
        (["--output=t.json"], "output: t.json must end in .parquet or .csv"),
    ],
)
def test_bad_input(
    words: list[str], sentence: str, model_path: str, reward_path: str, data_path: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = ["generate", f"--output={tmp_path}/t.csv", f"--model={model_path}", f"--data.path={data_path}"]
    with pytest.raises(SystemExit):
        main([*base, *(word.format(model=model_path, reward=reward_path) for word in words)])
    assert re.search(sentence, capsys.readouterr().err)
