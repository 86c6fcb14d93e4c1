"""Reports of any runs by their folders, of unfinished runs, and of tables that another tool wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from rlhf import files
from rlhf.callbacks.curves import CurveLogger
from rlhf.cli.main import main
from rlhf.evaluation.tables import write_notes, write_table
from rlhf.report import report as report_file
from rlhf.report.run_folders import resolved
from rlhf.report.runs import judged_rows

QUERIES = 40


def folder(path: Path, win: float, judge: str = "Gold", judged: bool = True, kl: float = 0.05) -> Path:
    """A pipeline's run folder with PPO, as far as a report reads it."""
    logger = CurveLogger(path / "ppo")
    logger.log_metrics({"objective/kl": 1.0, "objective/scores": 0.5, "validation/score": 0.4}, 64)
    config = {"seed_everything": 7, "run_dir": f"{path}/ppo", "model": {"init_args": {"ppo": {"kl_coefficient": kl}}}}
    config["model"]["init_args"]["model_path"] = f"{path}/sft/export"
    (path / "ppo" / files.CONFIG).write_text(yaml.safe_dump(config))
    (path / files.STATE).write_text(json.dumps({"ppo": {"finished": judged}, "report": {"finished": judged}}))
    if judged:
        outcome = (np.arange(QUERIES) < win * QUERIES).astype(float)
        write_table(
            pd.DataFrame({
                "query": [f"q{n}" for n in range(QUERIES)], "a": "x", "b": "y", "a_first": "a", "b_first": "a",
                "outcome": outcome, "a_gold": outcome * 2, "a_score": outcome,
            }),
            path / "judge_ppo.parquet",
        )  # fmt: skip
        write_notes(path / "judge_ppo.parquet", {"settings": {"judge": {"class": judge}}})
        (path / "ppo" / files.EXPORT).mkdir()
        (path / "ppo" / files.EXPORT / files.MANIFEST).write_text("{}")
    return path


def test_runs_by_their_folders_are_compared_with_the_first(tmp_path: Path) -> None:
    paths = [folder(tmp_path / "a" / "run", 0.5), folder(tmp_path / "b" / "run", 0.75, kl=0.1)]
    main(["report", "--runs", *map(str, paths), "--output", str(tmp_path / "out")])
    found = pd.read_csv(tmp_path / "out" / "report" / "run_differences.csv").set_index("measure")
    assert found[["run", "baseline", "policy", "queries"]].iloc[0].tolist() == ["b/run", "a/run", "PPO", QUERIES]
    assert found["difference"].to_dict() == {"win rate": 0.25, "score": 0.25, "gold": 0.5}
    # A mean of 40 differences of which 10 are 1 is Binomial(40, 0.25) / 40 when resampled: quantiles 5 and 16 of 40.
    assert found.loc["win rate", ["low", "high"]].tolist() == pytest.approx([5 / 40, 16 / 40], abs=0.026)
    settings = pd.read_csv(tmp_path / "out" / "report" / "settings.csv")
    assert settings.to_numpy().tolist() == [["ppo", "model.ppo.kl_coefficient", 0.05, 0.1]]  # no path, no run_dir
    summary = pd.read_csv(tmp_path / "out" / "report" / "summary.csv")
    assert summary["size"].tolist() == ["a/run", "a/run", "b/run", "b/run"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "rises with size" not in text
    assert "Stages so far" not in text


def test_win_rates_of_other_judges_are_not_compared(tmp_path: Path) -> None:
    paths = [folder(tmp_path / "a", 0.5), folder(tmp_path / "b", 0.75, judge="Mine")]
    main(["report", "--runs", *map(str, paths), "--output", str(tmp_path / "out")])
    found = pd.read_csv(tmp_path / "out" / "report" / "run_differences.csv").set_index("measure")
    assert pd.isna(found.loc["win rate", "difference"])
    assert found.loc["win rate", "note"] == "not compared: the runs have other judges"
    assert found.loc["gold", "difference"] == 0.5


def test_a_run_that_is_not_finished_shows_what_there_is(tmp_path: Path) -> None:
    run = folder(tmp_path / "a", 0.5, judged=False)
    main(["report", "--runs", str(run), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No policy is judged yet" in text
    assert "| a | 7 | ppo | not finished | 64 |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Nothing is judged yet</h1>" in page
    assert "<h2>PPO</h2>" in page


def test_the_folder_of_one_stage_is_a_run(tmp_path: Path) -> None:
    folder(tmp_path / "a", 0.5, judged=False)
    [run] = resolved([str(tmp_path / "a" / "ppo")])
    assert (run.size, run.seed, run.stages) == ("ppo", 7, {"ppo": str(tmp_path / "a" / "ppo")})


def test_watching_ends_when_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a"
    (run / "ppo").mkdir(parents=True)
    (run / files.STATE).write_text('{"ppo": {"finished": false}}')
    changes = iter([lambda: folder(run, 0.5, judged=False), lambda: folder(run, 0.5)])
    monkeypatch.setattr(report_file, "sleep", lambda _: next(changes)())
    main(["report", "--runs", str(run), "--watch", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.index("has nothing to show yet") < said.index("made; waiting")
    assert said.count("made; waiting") == 1
    assert pd.read_csv(tmp_path / "out" / "report" / "summary.csv")["win_rate"].iloc[0] == 0.5


def test_tables_of_strangers(tmp_path: Path) -> None:
    table = pd.DataFrame({"query": ["q", "r", "s", "t"], "a": "x", "b": "y z", "outcome": ["a", "tie", "b", "a"]})
    paths = [str(tmp_path / "mine.csv"), str(tmp_path / "other.parquet")]
    write_table(table, paths[0])
    write_table(table.assign(outcome=[1, 0.5, 0, np.nan]), paths[1])
    rows = judged_rows(resolved(paths))
    assert rows["outcome"].fillna(-1).tolist() == [1, 0.5, 0, 1, 1, 0.5, 0, -1]
    main(["report", "--runs", *paths, "--output", str(tmp_path / "out")])
    rates = pd.read_csv(tmp_path / "out" / "report" / "win_rates.csv").set_index("policy")
    assert rates["win_rate"].to_dict() == {"mine": 0.625, "other": 0.5}
    assert rates["position_bias"].isna().all()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("words.csv", "query,a,b,outcome\nq,x,y,win\n", "nor one of the words a, tie, b: 'win'"),
        ("notes.txt", "x", "neither the folder of a run nor a table in .parquet or .csv"),
        ("empty", None, "empty is no run: it has no judge_*.parquet and no curves.jsonl"),
        ("begun", None, "begun has nothing to show yet"),
        ("nowhere", None, "neither a folder nor a table"),
    ],
)
def test_what_is_no_run_gets_one_sentence(
    name: str, text: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    elif name != "nowhere":
        (tmp_path / name).mkdir()
    if name == "begun":
        (tmp_path / name / files.STATE).write_text("{}")
    with pytest.raises(SystemExit):
        main(["report", "--runs", str(tmp_path / name), "--output", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
