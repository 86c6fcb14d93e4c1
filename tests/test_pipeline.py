from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlhf.pipeline
from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.evaluation.curves import read_curves
from rlhf.pipeline import Stage, pipeline

ROOT = Path(__file__).parent.parent
SMALL = {
    "sizes": {
        "pretraining": 64, "train": 160, "validation": 8, "comparisons": 64, "comparisons_validation": 12,
        "comparisons_news": 6,
    },
    "model": {"hidden_size": 32, "layers": 1, "heads": 2, "vocabulary": 500},
}  # fmt: skip
QUICK = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4", "--trainer.check_val_every_n_epoch=1"]


@pytest.fixture
def quickstart(tmp_path: Path) -> dict[str, Any]:
    """The quickstart with small data and a small model, ready for `pipeline(**quickstart)`."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "quickstart", configs)
    data = yaml.safe_load((configs / "data.yaml").read_text())
    (configs / "data.yaml").write_text(yaml.safe_dump(data | SMALL))
    stages = yaml.safe_load((configs / "pipeline.yaml").read_text())["stages"]
    return {
        "stages": [Stage(**stage) for stage in stages],
        "run_dir": str(tmp_path / "run"),
        "config_dir": str(configs),
        "arguments": [*QUICK, "--trainer.accelerator=cpu"],
    }


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the stages in this process, which saves their start, and keeps their commands."""
    seen: list[list[str]] = []

    def run(stage: Stage, words: list[str]) -> float:
        seen.append(words)
        start = time.monotonic()
        main(words)
        return time.monotonic() - start

    monkeypatch.setattr(rlhf.pipeline, "_run", run)
    return seen


def test_from_nothing_to_a_report(
    quickstart: dict[str, Any], commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(**quickstart)
    run = tmp_path / "run"
    assert [words[0] for words in commands] == ["synthesize", "fit", "fit", "fit", "fit", "report"]
    report = (run / "report.md").read_text()
    for heading in ("SFT, PPO and the reference", "Reward model", "PPO", "Samples"):
        assert f"## {heading}" in report
    assert "clean (gold score)" in report
    assert report.count("- **reference**:") == 5
    assert {"sft.png", "reward.png", "ppo.png"} <= {file.name for file in run.iterdir()}
    summary = pd.read_csv(run / "summary.csv").set_index("policy")
    responses = pd.read_csv(run / "responses_ppo.csv")
    assert summary.loc["PPO", "score"] == pytest.approx(responses["score"].mean())
    assert summary.loc["PPO", "gold"] == pytest.approx(responses["gold"].mean())
    assert len(responses) == 8
    curves = read_curves(run / "ppo")
    assert curves["val/ratio_max_deviation"].max() < 1e-5
    assert curves["objective/kl"].iloc[0] == pytest.approx(0, abs=1e-4)
    assert curves["validation/gold_scores"].index.tolist() == [128, 256]
    AutoModelForCausalLM.from_pretrained(run / "ppo" / "export")
    AutoModelForSequenceClassification.from_pretrained(run / "reward" / "export")
    out = capsys.readouterr().out
    assert "tensorboard --logdir" in out
    assert "report.md" in out

    commands.clear()
    pipeline(**quickstart)
    assert commands == []  # everything is finished

    shutil.rmtree(run / "ppo")
    pipeline(**quickstart)
    assert [words[0] for words in commands] == ["fit", "report"]


def test_a_stopped_pipeline_goes_on(
    quickstart: dict[str, Any], commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = quickstart | {"stages": quickstart["stages"][:2]}
    inner = rlhf.pipeline._run

    def stop_at_fit(stage: Stage, words: list[str]) -> float:
        if stage.command == "fit":
            main([*words, "--trainer.max_epochs=1"])
            raise KeyboardInterrupt
        return inner(stage, words)

    monkeypatch.setattr(rlhf.pipeline, "_run", stop_at_fit)
    with pytest.raises(KeyboardInterrupt):
        pipeline(**few)
    monkeypatch.setattr(rlhf.pipeline, "_run", inner)
    commands.clear()
    pipeline(**few)
    assert len(commands) == 1
    assert commands[0][-2:] == ["--ckpt_path", "last"]
    manifest = json.loads((tmp_path / "run" / "pretrain" / "export" / "rlhf.json").read_text())
    assert manifest["epochs"] == 2


def test_other_settings_never_overwrite(quickstart: dict[str, Any], commands: list[list[str]]) -> None:
    few = quickstart | {"stages": quickstart["stages"][:2]}
    pipeline(**few)
    with pytest.raises(UserError, match="pretrain' with other settings"):
        pipeline(**(few | {"arguments": [*quickstart["arguments"], "--trainer.max_epochs=3"]}))
    with pytest.raises(UserError, match="with other settings"):
        pipeline(**(few | {"seed": 5}))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages.sft.config"):
        pipeline([Stage("sft", config="nowhere.yaml")], run_dir=str(tmp_path / "run"))


def test_stages_run_in_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    main([
        "pipeline", f"--run_dir={tmp_path}/run", f"--config_dir={tmp_path}",
        '--stages=[{"name": "data", "command": "synthesize", "config": "data.yaml"}]',
    ])  # fmt: skip
    assert (tmp_path / "run" / "data" / "model" / "config.json").is_file()
    with pytest.raises(SystemExit):
        main(["pipeline", f"--run_dir={tmp_path}/other", '--stages=[{"name": "ppo", "command": "report"}]'])
    assert "the stage ppo ended with status 2" in capfd.readouterr().err


@pytest.mark.parametrize("missing", ["sft", "reward", "ppo"])
def test_a_report_needs_finished_stages(tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    words: list[str] = []
    for stage in ("sft", "reward", "ppo"):
        if stage != missing:
            (tmp_path / stage / "export").mkdir(parents=True)
            (tmp_path / stage / "export" / "rlhf.json").write_text("{}")
        words.append(f"--{stage}={tmp_path / stage}")
    with pytest.raises(SystemExit):
        main(["report", f"--output={tmp_path}", "--data.path=x.jsonl", *words])
    assert f"error: {missing}:" in capsys.readouterr().err
