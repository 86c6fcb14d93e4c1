"""Judged tables: joining, rules, the numbers in the summary, bad input, a judge of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from rlhf.cli.main import VERBS, main
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.evaluation.generate import generate
from rlhf.evaluation.judges import Answers, Judge, Pair
from rlhf.evaluation.pairwise import Candidate, judge, summarise
from rlhf.evaluation.reward_scorer import RewardScorer
from rlhf.evaluation.tables import read_table, write_table
from rlhf.synthetic.posts import demonstrations

CONFIGS = Path(__file__).parents[2] / "configs" / "evaluation"


class Scripted(Judge):
    """A judge of one's own, whose answers stand in the text of A."""

    def prefer(self, pairs: Sequence[Pair]) -> list[Answers]:
        return [Answers(*pair.a.split()[-2:]) for pair in pairs]  # type: ignore[arg-type]


def table_of(answers: list[tuple[str, str]], folder: Path) -> Candidate:
    """A table whose responses hold what `Scripted` answers."""
    rows = pd.DataFrame({"query": [f"q{n}" for n in range(len(answers))], "response": [" ".join(x) for x in answers]})
    write_table(rows.assign(reference="r"), folder / "t.csv")
    return Candidate(str(folder / "t.csv"))


def test_the_numbers_of_a_summary(tmp_path: Path) -> None:
    answers = [("a", "a"), ("a", "b"), ("tie", "a"), ("b", "b"), ("invalid", "a"), ("tie", "tie"), ("a", "b")]
    ours = table_of(answers, tmp_path)
    table = judge(str(tmp_path / "j.parquet"), ours, Candidate(ours.table, "reference"), Scripted())
    outcomes = [1, 0.5, 0.75, 0, np.nan, 0.5, 0.5]
    np.testing.assert_array_equal(table["outcome"], outcomes)
    said = summarise(table)
    assert said["win_rate"] == pytest.approx(3.25 / 6)
    # Wilson: the two roots of (p - 3.25/6)^2 = z^2 p (1 - p) / 6 with z = 1.959964
    a, b, c = 1 + 1.959964**2 / 6, -2 * 3.25 / 6 - 1.959964**2 / 6, (3.25 / 6) ** 2
    assert [said["high"], said["low"]] == pytest.approx(list(np.roots([a, b, c])), rel=1e-5)
    assert (said["rows"], said["ties"], said["invalid"], said["by_rule"]) == (7, 3, 1, 0)
    # the first one was chosen by a_first=a (3) and b_first=b (3), the second by a_first=b (1) and b_first=a (3)
    assert said["position_bias"] == pytest.approx((6 - 4) / 10)
    assert said["order_agreement"] == pytest.approx(3 / 6)
    assert json.loads((tmp_path / "j.parquet.json").read_text())["summary"] == {**said, "usage": {}}


def test_columns_of_a_judged_table(model_path: str, reward_path: str, write_jsonl: Any, tmp_path: Path) -> None:
    source = Source(write_jsonl("d.jsonl", demonstrations(6, 1, "validation")))
    output = f"{tmp_path}/sft.csv"
    made = generate(output, model_path, source, response_length=8, temperature=1.0, reward=reward_path,
                    reference=model_path)  # fmt: skip
    words = [f"--a.table={tmp_path}/sft.csv", f"--b.table={tmp_path}/sft.csv", "--b.column=reference"]
    main(["judge", *words, "--a.name=SFT", "--judge=GoldJudge", f"--output={tmp_path}/j.csv"])
    table = read_table(tmp_path / "j.csv", "x", ("query",))
    assert list(table) == [
        "id", "query", "a", "b", "a_name", "b_name", "judge", "a_first", "b_first", "outcome", "asked",
        "a_tokens", "a_score", "a_gold", "a_has_eos", "a_kl", "b_tokens", "b_score", "b_gold",
    ]  # fmt: skip
    assert set(table["a_name"]) == {"SFT"}
    assert set(table["b_name"]) == {"reference"}
    assert set(table["judge"]) == {"GoldJudge"}
    np.testing.assert_array_equal(table["outcome"], np.sign(made["gold"] - made["gold_reference"]) / 2 + 0.5)
    for ours, theirs in {"b_tokens": "reference_tokens", "b_score": "reference_score", "a_gold": "gold"}.items():
        np.testing.assert_array_equal(table[ours], made[theirs])
    assert table["id"].tolist() == made["id"].tolist()
    main(["judge", *words, "--judge=RewardJudge", f"--judge.model={reward_path}", f"--output={tmp_path}/r.csv"])
    judged, scorer = read_table(tmp_path / "r.csv", "x")["outcome"], RewardScorer(reward_path)
    ours = scorer(made["query"], made["response"])  # ended with EOS, which no sampled response is here
    np.testing.assert_array_equal(judged, np.array(ours) > made["reference_score"])


def test_empty_and_equal_texts_are_decided_by_rule(tmp_path: Path) -> None:
    texts = [("", "r"), (" \n", "r"), ("x", ""), ("", ""), ("same", " same "), ("a b", "r")]
    rows = pd.DataFrame(texts, columns=["ours", "response"]).assign(query=list("uvwxyz"))
    for name in ("ours", "response"):
        write_table(rows[["query", name]].set_axis(["query", "response"], axis=1), tmp_path / f"{name}.csv")
    ours, theirs = (Candidate(f"{tmp_path}/{name}.csv") for name in ("ours", "response"))
    table = judge(str(tmp_path / "j.csv"), ours, theirs, Scripted())
    assert table["outcome"].tolist() == [0, 0, 1, 0.5, 0.5, 0.5]
    assert table["asked"].tolist() == [False] * 5 + [True]
    said = summarise(table)
    assert (said["empty_a"], said["empty_b"], said["by_rule"]) == (3, 2, 5)
    assert (said["position_bias"], said["order_agreement"]) == (1, 0)  # of the one answer that was given


OWN = """
from rlhf.evaluation.judges import Answers, Judge

class LongerWins(Judge):
    def __init__(self, by: int = 0):
        self.by = by

    def prefer(self, pairs):
        winners = ["a" if len(p.a) > len(p.b) + self.by else "b" for p in pairs]
        return [Answers(winner, winner) for winner in winners]
"""


@pytest.fixture
def own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Words that let a user's own judge, in a file of his own, judge two tables."""
    (tmp_path / "longer_wins.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def make(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[str]:
        write_table(ours, "ours.csv")
        write_table(theirs, "theirs.csv")
        tables = ["--a.table=ours.csv", "--b.table=theirs.csv", "--output=j.csv"]
        return ["judge", *tables, "--judge=longer_wins.LongerWins"]

    return make


def test_policy_against_policy_by_a_judge_of_ones_own(
    own_words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.DataFrame({"query": list("xyz"), "response": ["aaaa", "bb", "ccc"], "tokens": [1, 2, 3]})
    words = own_words(rows, rows.assign(response=["bbb", "bbb", "b"]).iloc[::-1])
    main(words)
    table = read_table("j.csv", "x", ("query",))
    assert table["b"].tolist() == ["bbb", "bbb", "b"]
    assert table["b_tokens"].tolist() == [1, 2, 3]
    assert table["outcome"].tolist() == [1, 0, 1]
    assert (table["a_name"].iloc[0], table["b_name"].iloc[0]) == ("ours", "theirs")
    assert "0.667" in capsys.readouterr().out
    main(words)
    assert "it is kept" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--judge.by=1"])
    assert "made with other settings (judge: " in capsys.readouterr().err
    main([*words, "--judge.by=1", "--output=k.csv"])
    assert read_table("k.csv", "x")["outcome"].tolist() == [0, 0, 1]


def test_only_shared_queries(own_words: Callable[..., list[str]]) -> None:
    rows = pd.DataFrame({"query": list("wxyz"), "response": ["a", "b", "c", "d"]})
    main([*own_words(rows.head(3), rows.assign(response="long").tail(3)), "--only_shared=true"])
    table = read_table("j.csv", "x")
    assert table["query"].tolist() == ["x", "y"]
    assert table["id"].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("ours", "theirs", "words", "sentence"),
    [
        ("xyz", "uvw", [], "share 0 queries; only the first has 3, only the second 3"),
        ("xyz", "uvw", ["--only_shared=true"], "share 0 queries"),
        ("xyz", "xyzw", [], "share 3 queries; only the first has 0, only the second 1"),
        ("xyy", "xyz", [], "a.table: ours.csv has 1 rows with the query of an earlier row"),
        ("xyz", "xyz", ["--b.column=reference"], "b.table: theirs.csv lacks reference; it has query, response"),
        ("xyz", "xyz", ["--b.table=./ours.csv"], "b.table: ./ours.csv is compared with itself; name another table"),
        ("xyz", "xyz", ["--b.table=none.csv"], "b.table: there is no table none.csv"),
        ("xyz", "xyz", ["--output=j.txt"], "output: j.txt must end in"),
        ("xyz", "xyz", ["--judge=NoJudge"], "NoJudge"),
        ("xyz", "xyz", ["--judge.nonsense=1"], "nonsense"),
        ("xyz", "xyz", ["--judge=GoldJudge"], "3 of 3 records have no hidden facts"),
    ],
)
def test_bad_input_gets_one_sentence(
    ours: str, theirs: str, words: list[str], sentence: str, own_words: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tables = [pd.DataFrame({"query": list(x), "response": f"text {n}"}) for n, x in enumerate((ours, theirs))]
    with pytest.raises(SystemExit) as stop:
        main([*own_words(*tables), *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "Traceback" not in error
    assert not Path("j.csv").exists()


@pytest.mark.parametrize("record", ["", "no JSON", "[1]"])
def test_a_record_that_is_none(tmp_path: Path, record: str) -> None:
    table = pd.DataFrame({"query": ["q"], "response": ["x"], "reference": ["y"], "record": [record]})
    write_table(table, tmp_path / "t.parquet")
    path = str(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"a\.table: the column record must hold JSON objects"):
        judge(str(tmp_path / "j.csv"), Candidate(path), Candidate(path, "reference"), Scripted())


def test_a_table_without_one_valid_answer_is_not_written(tmp_path: Path) -> None:
    ours = table_of([("invalid", "a"), ("b", "invalid")], tmp_path)
    with pytest.raises(UserError, match="not one of 2 pairs has a valid answer in both orders"):
        judge(str(tmp_path / "j.csv"), ours, Candidate(ours.table, "reference"), Scripted())
    assert not (tmp_path / "j.csv").exists()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_parse(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb = file.stem.split("_")[0]
    assert verb in VERBS
    with pytest.raises(SystemExit) as stop:
        main([verb, f"--config={file}", "--print_config"])
    assert not stop.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(file.read_text())
    assert shown["output"] == given["output"]
    if verb == "judge":
        chosen = given["judge"]
        name = chosen if isinstance(chosen, str) else chosen["class_path"]
        assert shown["judge"]["class_path"] == f"rlhf.evaluation.judges.{name}"


@pytest.mark.parametrize("verb", ["generate", "judge", "margins"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "file of the" in shown
    assert "--output" in shown


def test_mere_prompts_have_no_reference_to_win_against(
    model_path: str, reward_path: str, write_jsonl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{side}.table={tmp_path}/t.csv" for side in "ab"] + ["--b.column=reference", "--judge=RewardJudge"]
    words += [f"--judge.model={reward_path}", f"--output={tmp_path}/j.csv"]
    prompts: list[dict[str, str]] = [{"prompt": f"Number {n}?"} for n in range(3)]
    source = Source(write_jsonl("p.jsonl", [prompts[0], prompts[1], prompts[2] | {"completion": " two"}]))
    made = generate(f"{tmp_path}/t.csv", model_path, source, response_length=4, reward=reward_path)
    assert made["reference_tokens"].gt(0).tolist() == [False, False, True]
    assert made["reference_score"].notna().tolist() == [False, False, True]
    main(["judge", *words])
    assert "b.table: 2 of 3 rows have no reference; left out." in capsys.readouterr().out
    assert len(read_table(tmp_path / "j.csv", "x")) == 1
    made["reference"] = ""
    write_table(made, tmp_path / "t.csv")
    with pytest.raises(SystemExit):
        main(["judge", *words[:-1], f"--output={tmp_path}/k.csv"])
    assert "has no reference in any row" in capsys.readouterr().err


def test_messages_name_the_options_of_their_command(
    model_path: str, write_jsonl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl("long.jsonl", [{"prompt": "number " * 60}])
    words = [f"--data={{path: {path}}}", f"--model={model_path}", "--text.max_query_length=8"]
    with pytest.raises(SystemExit):
        main(["generate", *words, f"--output={tmp_path}/t.csv"])
    said = capsys.readouterr().err
    assert "raise text.max_query_length, or set text.drop_unfittable" in said
    assert "data.text" not in said
