from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.report.curve_files import read_curves
from rlhf.studies.pipeline import pipeline, run_stages
from rlhf.studies.processes import Ended, stage_processes
from rlhf.studies.recipe import evaluation_stages
from rlhf.studies.runner import Job, Runner, Stage, run_jobs
from rlhf.synthetic.synthesize import SmallModel, create_model

ROOT = Path(__file__).parents[2]
SMALL = {
    "sizes": {
        "pretraining": 0, "train": 160, "validation": 8, "comparisons": 64, "comparisons_validation": 12,
        "comparisons_news": 6,
    }
}  # fmt: skip
QUICK = {"max_epochs": 2, "limit_train_batches": 4, "check_val_every_n_epoch": 1, "accelerator": "cpu"}
FEW = {"reward": False, "ppo": False}  # data and SFT


@pytest.fixture
def quickstart(tmp_path: Path) -> dict[str, Any]:
    """The quickstart with small data and a small model, ready for `pipeline(**quickstart)`."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "quickstart", configs)
    data = yaml.safe_load((configs / "data.yaml").read_text())
    (configs / "data.yaml").write_text(yaml.safe_dump(data | SMALL))
    config = yaml.safe_load((configs / "pipeline.yaml").read_text())
    return {**config, "run_dir": str(tmp_path / "run"), "config_dir": str(configs), "trainer": QUICK}


def test_from_nothing_to_a_report(
    quickstart: dict[str, Any],
    commands: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, inner, pages = tmp_path / "run", stage_processes.run, list[str]()

    def look(words: list[str], log: Path | None = None) -> Ended:
        pages.append((run / "report.html").read_text() if (run / "report.html").is_file() else "")
        return inner(words, log)

    monkeypatch.setattr(stage_processes, "run", look)
    few = {"batch_size": 16, "rollout_batch_size": 16, "micro_batch_size": 8}
    quickstart["ppo"] = quickstart["ppo"] | {"data": few}
    pipeline(**quickstart)
    for page, there, missing in (
        (pages[2], "", "html"), (pages[4], "Supervised fine-tuning", "Training of the reward model"),
        (pages[6], "Training of the reward model", "<h2>PPO</h2>"), (pages[8], "<h2>PPO</h2>", "Samples"),
    ):  # fmt: skip
        assert there in page  # to look at while the next stage runs
        assert missing not in page
    evaluated = ["generate", "generate", "judge", "judge", "margins", "report"]
    assert [words[0] for words in commands] == ["rehearse", "synthesize", *["fit", "report"] * 3, *evaluated]
    report = (run / "report.md").read_text()
    page = (run / "report.html").read_text()
    for heading in ("SFT, PPO and the reference", "Reward model", "PPO", "Samples"):
        assert f"<h2>{heading}</h2>" in page
    assert "clean (gold score)" in page
    assert len(page) < 5_000_000
    assert report.count("- **reference**:") == 5
    assert {"sft_curves.csv", "reward_curves.csv", "ppo_curves.csv"} <= {
        file.name for file in (run / "report").iterdir()
    }
    summary = pd.read_csv(run / "report" / "summary.csv").set_index("policy")
    responses = pd.read_parquet(run / "generate_ppo.parquet")
    assert summary.loc["PPO", "score"] == pytest.approx(responses["score"].mean())
    assert summary.loc["PPO", "gold"] == pytest.approx(responses["gold"].mean())
    assert len(responses) == len(pd.read_parquet(run / "judge_ppo.parquet")) == 8
    assert summary["seed"].unique().tolist() == [44413]
    curves = read_curves(run / "ppo")
    assert curves["val/ratio_max_deviation"].max() < 1e-5
    assert curves["objective/kl"].iloc[0] == pytest.approx(0, abs=1e-4)
    assert curves["validation/gold_scores"].index.tolist() == [0, 16, 32]
    course = pd.read_csv(run / "report" / "over_optimisation.csv")
    assert course["update"].tolist() == [0, 1, 2]
    assert course["gold_scores"].tolist() == pytest.approx(curves["validation/gold_scores"].tolist())
    AutoModelForCausalLM.from_pretrained(run / "ppo" / "export")
    AutoModelForSequenceClassification.from_pretrained(run / "reward" / "export")
    out = capsys.readouterr().out
    assert "tensorboard --logdir" in out
    assert "report.html" in out

    commands.clear()
    pipeline(**quickstart)
    assert commands == []  # everything is finished

    shutil.move(run / "ppo", tmp_path / "ppo")

    def pretend(words: list[str], log: Path | None = None) -> Ended:
        if words[0] == "rehearse":
            return inner(words, log)
        commands.append(words)
        if words[0] == "fit":
            shutil.move(tmp_path / "ppo", run / "ppo")
        return Ended(0, 0.0, 0.0)

    monkeypatch.setattr(stage_processes, "run", pretend)
    pipeline(**quickstart)
    assert [words[0] for words in commands] == ["rehearse", "fit", "report", "generate", "judge", "report"]


def test_a_stopped_pipeline_goes_on(
    quickstart: dict[str, Any], commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = quickstart | FEW
    inner = stage_processes.run

    def stop_at_fit(words: list[str], log: Path | None) -> Ended:
        if words[0] == "fit":
            main([*words, "--trainer.max_epochs=1"])
            raise KeyboardInterrupt
        return inner(words, log)

    monkeypatch.setattr(stage_processes, "run", stop_at_fit)
    with pytest.raises(KeyboardInterrupt):
        pipeline(**few)
    monkeypatch.setattr(stage_processes, "run", inner)
    commands.clear()
    pipeline(**few)
    assert [words[0] for words in commands] == ["rehearse", "fit", "report"]
    assert commands[1][-2:] == ["--ckpt_path", "last"]
    manifest = json.loads((tmp_path / "run" / "sft" / "export" / "rlhf.json").read_text())
    assert manifest["epochs"] == 2


def test_other_settings_never_overwrite(quickstart: dict[str, Any], commands: list[list[str]]) -> None:
    few = quickstart | FEW
    pipeline(**few)
    with pytest.raises(UserError, match="results of sft with other settings"):
        pipeline(**(few | {"trainer": QUICK | {"max_epochs": 3}}))
    with pytest.raises(UserError, match="with other settings"):
        pipeline(**(few | {"seed": 5}))


def test_a_run_goes_on_where_it_was_moved_to(
    quickstart: dict[str, Any], commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fingerprints know what a config says and which stages are taken, not where they are."""
    monkeypatch.chdir(tmp_path)
    few = quickstart | FEW
    pipeline(**few)
    assert [words[0] for words in commands] == ["rehearse", "synthesize", "fit", "report"]
    commands.clear()
    pipeline(**few | {"run_dir": "run", "config_dir": "configs"})
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run", moved / "run")
    shutil.move(tmp_path / "configs", moved / "configs")
    pipeline(**few | {"run_dir": str(moved / "run"), "config_dir": str(moved / "configs")})
    assert commands == []
    config = moved / "configs" / "sft.yaml"
    config.write_text(config.read_text() + "# changed\n")
    with pytest.raises(UserError, match="results of sft with other settings"):
        pipeline(**few | {"run_dir": str(moved / "run"), "config_dir": str(moved / "configs")})


def test_takes_of_a_command_that_is_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="no stage of the evaluation has the command 'generat'"):
        evaluation_stages({"generat": {"data.limit": 3}})


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages.sft.config"):
        run_stages([Stage("sft", config="nowhere.yaml")], run_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("start", ["fork", "spawn"])  # without and with a GPU
def test_stages_run_in_processes_of_their_own(
    start: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: start == "spawn")
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    run_stages([Stage("data", "synthesize", "data.yaml")], f"{tmp_path}/run", str(tmp_path))
    assert (tmp_path / "run" / "data" / "demonstrations" / "train.jsonl").is_file()
    if start == "fork":
        with pytest.raises(UserError, match="the stage ppo ended with status 2"):
            run_stages([Stage("ppo", "report")], f"{tmp_path}/other")


# ----------------------------------------------------------------------------------- stages that write a table


@pytest.fixture
def evaluation(tmp_path: Path, model_path: str, commands: list[list[str]], demonstration_file: str) -> dict[str, Any]:
    """A pipeline that generates with a finished stage `sft`, and judges; ready for `run_stages(**evaluation)`."""
    shutil.copytree(model_path, tmp_path / "run" / "sft" / "export")
    _finish_sft(tmp_path / "run", "first")
    (tmp_path / "generate.yaml").write_text("temperature: 0.01\n")
    takes = {
        "model": "{run}/sft/export", "reward": None, "data.path": demonstration_file, "data.split": "train",
        "data.limit": 6, "response_length": 4,
    }  # fmt: skip
    table = "{run}/responses.parquet"
    stages = [
        Stage("responses", "generate", "generate.yaml", takes),
        Stage(
            "judged", "judge", takes={"a.table": table, "b.table": table, "b.column": "reference", "judge": "GoldJudge"}
        ),
    ]
    return {"stages": stages, "run_dir": str(tmp_path / "run"), "config_dir": str(tmp_path)}


def _finish_sft(run: Path, identity: str) -> None:
    """As if the stage `sft` had been run (again)."""
    file = run / "pipeline.json"
    state = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(state | {"sft": {"fingerprint": "", "finished": True, "identity": identity}}))


def test_a_table_is_one_file_and_is_kept(evaluation: dict[str, Any], commands: list[list[str]], tmp_path: Path) -> None:
    run_stages(**evaluation, seed=3)
    run = tmp_path / "run"
    assert [words[-1] for words in commands] == ["--response_length=4", "--judge=GoldJudge"]
    assert f"--output={run}/judged.parquet" in commands[1]
    assert not (run / "responses").exists()
    assert len(pd.read_parquet(run / "judged.parquet")) == 6
    commands.clear()
    run_stages(**evaluation, seed=4)  # training stages have seeds
    assert commands == []
    (run / "judged.parquet").unlink()
    run_stages(**evaluation)
    assert [words[0] for words in commands] == ["judge"]


def test_tables_follow_a_stage_that_was_run_again_and_answers_stay(
    evaluation: dict[str, Any], commands: list[list[str]], tmp_path: Path, tokenizer: Any
) -> None:
    run_stages(**evaluation)
    run = tmp_path / "run"
    before = pd.read_parquet(run / "judged.parquet")
    answers = run / "judged.parquet.answers.jsonl"
    answers.write_text("paid for\n")
    create_model(run / "sft" / "export", tokenizer, SmallModel(hidden_size=32, layers=1, heads=2), seed=9)
    _finish_sft(run, "second")
    parts = run / "judged.parquet.parts"  # of a judgement that was killed
    parts.mkdir()
    commands.clear()
    run_stages(**evaluation)
    assert [words[0] for words in commands] == ["generate", "judge"]
    assert (pd.read_parquet(run / "judged.parquet")["a"] != before["a"]).any()
    assert not parts.exists()
    assert answers.read_text() == "paid for\n"


def test_a_table_of_other_settings_is_not_overwritten(
    evaluation: dict[str, Any], commands: list[list[str]], tmp_path: Path
) -> None:
    run_stages(**evaluation)
    commands.clear()
    config = tmp_path / "generate.yaml"
    config.write_text(config.read_text() + "temperature: 0.7\n")
    with pytest.raises(UserError, match=r"results of responses with other settings"):
        run_stages(**evaluation)
    assert commands == []


def test_the_seed_stands_in_what_a_stage_takes(tmp_path: Path) -> None:
    stage = Stage("report", "report", takes={"runs": [{"size": "x", "seed": "{seed}"}], "title": "seed {seed}"})
    assert Runner(tmp_path, seed=5).words(stage)[2:] == ['--runs=[{"size": "x", "seed": 5}]', "--title=seed 5"]
    assert "--title=seed 44413" in Runner(tmp_path).words(stage)


# ------------------------------------------------------------------------------------------- jobs side by side


def test_jobs_run_side_by_side_and_after_each_other() -> None:
    ended: list[str] = []
    both = threading.Barrier(2, timeout=60)

    def job(name: str, after: str | None = None, meets: bool = False) -> Job:
        def run() -> None:
            if meets:
                both.wait()
            ended.append(name)

        return Job(name, run, after)

    jobs = [job("a", meets=True), job("b", "a"), job("c", "b"), job("x", meets=True)]
    so_far: list[int] = []
    run_jobs(jobs, 2, lambda: ended.append("result"), lambda: so_far.append(len(ended)))
    assert sorted(ended[:-1]) == ["a", "b", "c", "x"]
    assert [name for name in ended if name != "x"] == ["a", "b", "c", "result"]
    assert 1 <= so_far[0] < 4


def test_a_failed_job_stops_what_comes_after_it_and_nothing_else() -> None:
    ended: list[str] = []

    def fail() -> None:
        raise UserError("broke")

    def job(name: str, after: str | None = None) -> Job:
        return Job(name, lambda: ended.append(name), after)

    with pytest.raises(UserError) as refused:
        run_jobs([Job("a", fail), job("b", "a"), job("c", "b"), job("d")], 1, lambda: ended.append("result"))
    first, *listed = str(refused.value).splitlines()
    assert first == "3 of 4 jobs failed; the same command resumes them:"
    assert listed == ["broke", "b: not run, because a failed", "c: not run, because b failed"]
    assert ended == ["d", "result"]


def test_an_error_that_is_no_users_ends_all() -> None:
    ended: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_jobs([Job("a", fail), Job("b", lambda: ended.append("b"), "a")], 1, lambda: ended.append("result"))
    assert ended == []
