from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError

from rlhf.errors import UserError
from rlhf.evaluation.tables import write_table
from rlhf.report.runs import (
    Baseline,
    Run,
    check_shared_queries,
    judged_rows,
    margin_rows,
    ordered,
)

JUDGED = pd.DataFrame({
    "query": ["q0", "q1"], "a": ["x", "y"], "b": ["z", "z"], "a_first": ["a", "b"], "b_first": ["a", "invalid"],
    "outcome": [1.0, float("nan")],
})  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with one policy."""
    write_table(JUDGED, tmp_path / "ppo.csv")
    return Run("1b", 10, 1, {"PPO": str(tmp_path / "ppo.csv")})


def table_of(tmp_path: Path, name: str, table: pd.DataFrame) -> str:
    write_table(table, tmp_path / name)
    return str(tmp_path / name)


def test_rows_know_whose_they_are(run: Run, tmp_path: Path) -> None:
    scored = table_of(tmp_path, "sft.parquet", JUDGED.assign(a_score=[1, 2], a_has_eos=[True, False]))
    small = Run("100m", 1, 2, {"SFT": scored, "PPO": run.policies["PPO"]}, checkpoints={3: scored})
    rows = judged_rows(ordered([run, small]))
    assert list(zip(rows["size"], rows["parameters"], rows["seed"], rows["policy"], strict=True)) == [
        *[("100m", 1, 2, "SFT")] * 2, *[("100m", 1, 2, "PPO")] * 2, *[("1b", 10, 1, "PPO")] * 2,
    ]  # fmt: skip
    assert rows["a_score"].notna().sum() == 2
    assert rows["a_has_eos"].iloc[0] == 1.0
    assert rows["outcome"].notna().tolist() == [True, False] * 3
    assert judged_rows([run, small], "update")["update"].tolist() == [3, 3]
    assert judged_rows([run], "update").empty
    assert margin_rows([run]).empty


def test_one_size_needs_no_parameters(run: Run) -> None:
    assert judged_rows([replace(run, parameters=None)])["parameters"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "size 1b, seed 1 is given twice"),
        ({"seed": 2, "parameters": 20}, "size 1b has 20 and 10 parameters|size 1b has 10 and 20 parameters"),
        ({"size": "2b", "parameters": None}, "size 2b has no parameters"),
        ({"size": "2b", "policies": {}}, "size 2b, seed 1 has neither policies nor stages"),
        ({"size": "2b"}, "two sizes have the same number of parameters"),
    ],
)
def test_runs_that_can_not_be_ordered(run: Run, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ordered([run, replace(run, **changes)])


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"stages": {"rl": "x"}}, "stages"),
        ({"parameters": 0}, "parameters"),
        ({"checkpoints": {0: "x"}}, "checkpoints"),
    ],
)
def test_settings_that_no_run_can_have(run: Run, changes: dict[str, object], setting: str) -> None:
    with pytest.raises(ValidationError, match=f"runs\n{setting}"):
        replace(run, **changes)


@pytest.mark.parametrize("changes", [{"win_rate": 60}, {"win_rate": -0.1}, {"parameters": 0}])
def test_a_baseline_has_a_win_rate_and_parameters(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="baselines"):
        replace(Baseline("x", 5, 0.6), **changes)


def test_no_run() -> None:
    with pytest.raises(UserError, match="at least one run"):
        ordered([])


def test_tables_that_can_not_be_read(run: Run, tmp_path: Path) -> None:
    def sentence(table: pd.DataFrame) -> str:
        bad = replace(run, policies={"PPO": table_of(tmp_path, "bad.csv", table)})
        with pytest.raises(UserError) as error:
            judged_rows([bad])
        return str(error.value)

    assert "lacks outcome" in sentence(JUDGED.drop(columns="outcome"))
    assert "PPO of size 1b, seed 1" in sentence(JUDGED.drop(columns=["a", "b"]))
    assert "has no rows" in sentence(JUDGED[:0])
    assert "the query of an earlier row" in sentence(JUDGED.assign(query="q"))
    assert "outcome that is not between 0 and 1" in sentence(JUDGED.assign(outcome=[1, 2]))
    with pytest.raises(UserError, match=r"there is no table .*nowhere.csv"):
        judged_rows([replace(run, policies={"PPO": "nowhere.csv"})])


def test_margins_are_numbers(run: Run, tmp_path: Path) -> None:
    margins = pd.DataFrame({"split": ["posts"], "batch": ["b"], "confidence": [None], "margin": [1.0]})
    rows = margin_rows([replace(run, margins=table_of(tmp_path, "m.parquet", margins))])
    assert rows[["size", "seed", "margin"]].iloc[0].tolist() == ["1b", 1, 1.0]
    with pytest.raises(UserError, match="a margin that is not a number"):
        margin_rows([replace(run, margins=table_of(tmp_path, "m.csv", margins.assign(margin=float("nan"))))])


def test_tables_must_share_queries(run: Run, tmp_path: Path) -> None:
    other = table_of(tmp_path, "other.csv", JUDGED.assign(query=["q1", "q2"]))
    rows = judged_rows([run, replace(run, seed=2, policies={"PPO": other})])
    check_shared_queries(rows)
    nothing = table_of(tmp_path, "nothing.csv", JUDGED.assign(query=["q2", "q3"]))
    rows = judged_rows([run, replace(run, seed=2, policies={"SFT": nothing})])
    with pytest.raises(UserError, match="SFT of size 1b, seed 2 shares no query with that of PPO of size 1b, seed 1"):
        check_shared_queries(rows)
