"""Reports of any runs by their folders, of unfinished runs, and of tables that another tool wrote."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest
import yaml

from rlhf import files
from rlhf.callbacks.curves import CurveLogger
from rlhf.cli.main import main
from rlhf.evaluation.tables import write_notes, write_table
from rlhf.report import report as report_file
from rlhf.report.report import report
from rlhf.report.run_folders import NothingYetError, finished, resolved
from rlhf.report.runs import judged_rows

QUERIES = 40
ROOT = Path(__file__).parents[2]


def folder(path: Path, win: float, judge: str = "Gold", judged: bool = True, kl: float = 0.05) -> Path:
    """A pipeline's run folder with PPO, as far as a report reads it."""
    logger = CurveLogger(path / "ppo")
    logger.log_metrics({f"{files.TOTAL}ppo": 256}, 0)
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


def test_bare_runs_are_compared_by_the_ends_of_their_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run folders of a Trainer in a script: no saved config, nothing judged, two seeds of `b`."""
    for name, kl in {"a": 1.0, "b/seed-1": 2.0, "b/seed-2": 4.0}.items():
        logger = CurveLogger(tmp_path / name)
        for update in range(1, 9):
            logger.log_metrics({"objective/kl": kl * update, "seconds/update": 1.0}, 64 * update)
    CurveLogger(tmp_path / "a").log_metrics({"validation/score": 0.5}, 512)
    paths = [str(tmp_path / name) for name in ("a", "b/seed-1", "b/seed-2")]
    table = report(str(tmp_path / "out"), paths)["curve_ends"]
    assert list(table) == ["stage", "curve", "a", "b"]
    ends = table.set_index("curve")[["a", "b"]]
    assert ends.loc["objective/kl"].tolist() == [7.5, 22.5]  # updates 7 and 8 of 8
    assert ends.loc["validation/score"].fillna(-1.0).tolist() == [0.5, -1.0]
    assert len(ends) == 2  # what a report has no chart of is not compared
    assert "| ppo | objective/kl | 7.500 | 22.500 |" in (tmp_path / "out" / "report.md").read_text()
    assert "22.500" in capsys.readouterr().out


def test_seeds_of_a_run_are_averaged_before_they_are_compared(tmp_path: Path) -> None:
    """Folders such as those of a study or of ablations: a name, and in it `seed-<n>`."""
    wins = {"b/seed-1": 0.5, "b/seed-2": 0.7, "a/seed-1": 0.9, "a/seed-2": 1.0}
    paths = [folder(tmp_path / name, win) for name, win in wins.items()]
    main(["report", "--runs", *map(str, paths), "--output", str(tmp_path / "out")])
    found = pd.read_csv(tmp_path / "out" / "report" / "run_differences.csv").set_index("measure")
    assert found[["run", "baseline"]].to_numpy().tolist() == [["a", "b"]] * 3
    assert found["difference"].to_dict() == pytest.approx({"win rate": 0.35, "score": 0.35, "gold": 0.7})
    rates = pd.read_csv(tmp_path / "out" / "report" / "win_rates.csv")
    assert list(zip(rates["size"], rates["seed"], strict=True)) == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>PPO&#39;s responses are preferred over the reference 60% of the time in b, 95% in a</h1>" in page
    assert "RLHF report: b, a, seeds 1, 2" in page
    assert '<th scope="col">run</th><th scope="col">seed</th>' in page


def test_a_run_without_anything_to_show_is_left_out_beside_others(tmp_path: Path) -> None:
    folder(tmp_path / "a", 0.5)
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / files.OWNER).write_text("{}")
    paths = [str(tmp_path / name) for name in "abc"]
    assert [run.size for run in resolved(paths)] == ["a"]
    with pytest.raises(NothingYetError, match=r"nothing to show yet in .*/b, .*/c:"):
        resolved(paths[1:])


def test_when_nothing_more_is_to_come_from_a_run(tmp_path: Path) -> None:
    run, done = folder(tmp_path / "a", 0.5), {"finished": True}
    for state, over in (
        ({"ppo": done}, False),  # the next stage is about to begin
        ({"ppo": done, files.ENDED: done}, True),  # one of a study, which has no report of its own
        ({"ppo": done, "report": done}, True),
        ({"ppo": {"finished": False}, "report": done}, False),  # it is run again
    ):
        (run / files.STATE).write_text(json.dumps(state))
        assert finished(str(run)) == over, state
    assert finished(str(run / "ppo"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / files.OWNER).write_text("{}")
    assert not finished(str(tmp_path / "begun"))


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
    assert "| stage | state | steps | of |" in text
    assert "| ppo | not finished | 64 | 256 |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>PPO: 64 of 256 episodes; nothing is judged yet</h1>" in page
    assert re.search(r'<dt>KL</dt><dd class="value">1.00</dd><dd class="note">at first 1.00</dd>', page)
    assert "RLHF report: a, seed 7, 20" in page
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
    assert said.index(f"nothing to show yet in {run}") < said.index("made; waiting")
    assert said.count("made; waiting") == 1
    assert pd.read_csv(tmp_path / "out" / "report" / "summary.csv")["win_rate"].iloc[0] == 0.5


def test_the_page_follows_a_run_while_it_trains(
    tmp_path: Path, model_path: str, demonstration_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT waits after each validation until the page shows it."""
    run, page, log, seen = tmp_path / "run", tmp_path / "out" / "report.html", CurveLogger.log_metrics, list[str]()

    def log_and_look(self: CurveLogger, metrics: dict[str, float], step: int | None = None) -> None:
        log(self, metrics, step)
        deadline = time.monotonic() + 60
        if "validation/loss" in metrics and step is not None:
            row = f"<td>sft</td><td>not finished</td><td>{step + 1}</td><td>4</td>"
            while not (page.is_file() and row in page.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            seen.append(row)

    monkeypatch.setattr(CurveLogger, "log_metrics", log_and_look)
    monkeypatch.setattr(report_file, "POLL", 0.02)
    found: list[dict[str, pd.DataFrame]] = []
    run.mkdir()
    (run / files.OWNER).write_text("{}")  # it has begun
    watcher = Thread(target=lambda: found.append(report(str(page.parent), [str(run)], watch=True)), daemon=True)
    watcher.start()
    data = f"{{'path': '{demonstration_file}', 'split': 'train', 'limit': 8}}"
    main([
        "fit", f"--config={ROOT}/configs/quickstart/sft.yaml", f"--run_dir={run}", f"--model.model_path={model_path}",
        "--model.response_length=2", f"--data.train={data}", f"--data.validation={data}", "--data.batch_size=4",
        "--data.micro_batch_size=4", "--trainer.max_epochs=2",
    ])  # fmt: skip
    watcher.join(60)
    assert len(seen) == 2
    assert found[0]["progress"][["state", "steps", "of"]].to_numpy().tolist() == [["finished", 4, 4]]
    assert "not finished" not in page.read_text()


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
    assert "RLHF report: mine, other, 20" in (tmp_path / "out" / "report.html").read_text()
    assert rates["position_bias"].isna().all()


def test_a_strangers_table_may_have_any_other_columns_and_gaps(tmp_path: Path) -> None:
    table = pd.DataFrame({
        "query": [1, 2, 3], "a": ["x", None, "z"], "b": ["y", "y", None], "outcome": ["A", None, "b"], "size": "large",
        "seed": "x", "win_rate": 0.5, "length": 3, "bin": 1, "log_ratio": "?", "policy": "p",
        "b_name": "SFT",
    })  # fmt: skip
    write_table(table, tmp_path / "mine.parquet")
    main(["report", "--runs", str(tmp_path / "mine.parquet"), "--output", str(tmp_path / "out")])
    summary = pd.read_csv(tmp_path / "out" / "report" / "summary.csv").set_index("policy")
    assert summary["win_rate"]["mine"] == 0.5
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>mine&#39;s responses are preferred over SFT 50% of the time</h1>" in page
    assert "<h2>mine and SFT</h2>" in page


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("words.csv", "query,a,b,outcome\nq,x,y,win\n", "nor one of the words a, tie, b: 'win'"),
        (
            "scores.csv",
            "query,a,b,outcome,a_score\nq,x,y,a,high\n",
            "scores.csv has a value in a_score that is not a number",
        ),
        ("notes.txt", "x", "neither the folder of a run nor a table in .parquet or .csv"),
        ("empty", None, "empty is no run: it has no judge_*.parquet and no curves.jsonl"),
        ("begun", None, "nothing to show yet in"),
        ("study/", None, "its runs are"),
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
    if name == "study/":
        (tmp_path / name / "w64" / "seed-1").mkdir(parents=True)
    if name == "begun":
        (tmp_path / name / files.STATE).write_text("{}")
    with pytest.raises(SystemExit):
        main(["report", "--runs", str(tmp_path / name), "--output", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
