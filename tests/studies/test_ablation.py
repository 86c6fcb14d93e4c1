from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image

from rlhf.callbacks.curves import CurveLogger
from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.studies.ablation import METRICS, final_values, markdown_table, read_points, write_result
from rlhf.studies.processes import Ended, stage_processes
from rlhf.studies.runner import Runner, Stage

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "configs" / "ablations" / "study.yaml"
PPO = ROOT / "configs" / "quickstart" / "ppo.yaml"
OVERLAYS = sorted(file for file in STUDY.parent.glob("*.yaml") if file != STUDY)
DETAILS = (ROOT / "docs" / "details.md").read_text()
SCORES = {("default", 1): 1.0, ("default", 2): 2.0, ("no_kl", 1): 4.0, ("no_kl", 2): 4.5}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Settings as a user types them, without the levels that only YAML has."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (flat(v, prefix if k == "init_args" else f"{prefix}.{k}".lstrip(".")) for k, v in tree.items())
    return {key: value for part in parts for key, value in part.items()}


def effective(capsys: pytest.CaptureFixture[str], *configs: Path) -> dict[str, Any]:
    """What the command line makes of config files."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *(f"--config={file}" for file in configs), "--print_config"])
    assert stop.value.code in (0, None)
    return flat(yaml.safe_load(capsys.readouterr().out))


def write_run(folder: Path, score: float, updates: int = 8) -> None:
    """Curves of a run that says its score from the first update to the last, and an export."""
    logger = CurveLogger(folder)
    for update in range(1, updates + 1):
        logger.log_metrics({"validation/score": score, "objective/kl": float(update)}, 10 * update)
    (folder / "export").mkdir()
    (folder / "export" / "rlhf.json").write_text("{}")


@pytest.fixture
def points(tmp_path: Path) -> pd.DataFrame:
    for (name, seed), score in SCORES.items():
        write_run(tmp_path / "runs" / name / str(seed), score)
    return read_points({(name, seed): tmp_path / "runs" / name / str(seed) for name, seed in SCORES})


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    """Words for a study of two ablations on a base that has a finished stage `sft`."""
    base, configs = tmp_path / "base", tmp_path / "configs"
    (base / "sft").mkdir(parents=True)
    (base / "pipeline.json").write_text(json.dumps({"sft": {"finished": True, "identity": "one", "fingerprint": ""}}))
    configs.mkdir()
    for name in ("ppo", "no_kl", "k3"):
        (configs / f"{name}.yaml").write_text(f"# {name}\n")
    stage = {"name": "ppo", "config": f"{configs}/ppo.yaml", "takes": {"model.model_path": "{base}/sft/export"}}
    words = [f"--stage={json.dumps(stage)}", "--ablations=[no_kl, k3]", "--seeds=[1, 2]"]
    return ["ablate", *words, f"--base={base}", f"--run_dir={tmp_path}/out", f"--config_dir={configs}"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stages write curves instead of training; keeps their commands."""
    seen: list[list[str]] = []

    def run(words: list[str], log: Path) -> Ended:
        seen.append(words)
        write_run(Path(next(word for word in words if word.startswith("--run_dir")).partition("=")[2]), 1.0)
        return Ended(0, 0.0, 0.0)

    monkeypatch.setattr(stage_processes, "run", run)
    return seen


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda file: file.stem)
def test_an_ablation_changes_what_it_says_and_nothing_else(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    default, changed = effective(capsys, PPO), effective(capsys, PPO, file)
    differs = {key: value for key, value in changed.items() if key not in default or default[key] != value}
    assert differs == flat(yaml.safe_load(file.read_text()))
    details = re.match(r"# (D\d\d(?:, D\d\d)*):", file.read_text())
    assert details, "the first line names the details"
    for detail in details[1].split(", "):
        entry = re.search(rf"^### {detail} .*?- \*\*setting:\*\*(.*?)- \*\*test", DETAILS, re.MULTILINE | re.DOTALL)
        assert entry
        assert any(f"`{key} = " in entry[1] for key in differs), f"none of these is a setting of {detail}"


def test_the_docs_name_every_ablation() -> None:
    text = (ROOT / "docs" / "ablations.md").read_text()
    assert [file.stem for file in OVERLAYS if f"`{file.stem}`" not in text] == []


def test_the_study_is_what_its_config_says(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stages = {name: {"finished": True, "identity": name, "fingerprint": ""} for name in ("data", "sft", "reward")}
    for name in stages:
        (tmp_path / "base" / name).mkdir(parents=True)
    (tmp_path / "base" / "pipeline.json").write_text(json.dumps(stages))
    main(["ablate", f"--config={STUDY}", f"--base={tmp_path}/base", f"--run_dir={tmp_path}/out"])
    config = yaml.safe_load(STUDY.read_text())
    assert len(commands) == len(config["seeds"]) * (1 + len(config["ablations"]))
    own = flat(yaml.safe_load(PPO.read_text()))
    for key in config["stage"]["takes"]:
        assert key in own, f"the study takes {key}, which {PPO.name} does not have"
    assert f"--model.model_path={tmp_path}/base/sft/export" in commands[0]


def test_every_ablation_with_every_seed_and_finished_ones_are_skipped(
    study: list[str], commands: list[list[str]], tmp_path: Path
) -> None:
    main(study)
    runs = {"/".join(word.split("/")[-2:]): words for words in commands for word in words if "--run_dir" in word}
    assert list(runs) == [f"{name}/seed-{seed}" for name in ("default", "no_kl", "k3") for seed in (1, 2)]
    configs = [str(tmp_path / "configs" / name) for name in ("ppo.yaml", "k3.yaml")]
    assert runs["k3/seed-2"][:5] == ["fit", "--config", configs[0], "--config", configs[1]]
    assert runs["default/seed-1"].count("--config") == 1
    assert f"--model.model_path={tmp_path}/base/sft/export" in runs["k3/seed-2"]
    assert runs["k3/seed-2"][-1] == "--seed_everything=2"
    report = (tmp_path / "out" / "ablations.md").read_text()
    assert "| k3 | 2 | 1.00 (1.00 to 1.00) | +0.00 |" in report
    assert "one seed" not in report
    commands.clear()
    main([*study, "--seeds=[1, 2, 3]", "--processes=2"])
    assert sorted(words[-1] for words in commands) == ["--seed_everything=3"] * 3


def test_a_failed_run_does_not_stop_the_others(
    study: list[str],
    commands: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inner = stage_processes.run

    def run(words: list[str], log: Path) -> Ended:
        if f"--run_dir={tmp_path}/out/no_kl/seed-2" in words:
            raise UserError("no_kl/seed-2 broke")
        return inner(words, log)

    monkeypatch.setattr(stage_processes, "run", run)
    with pytest.raises(SystemExit):
        main(study)
    assert "1 of 6 jobs failed; the same command resumes them:\nno_kl/seed-2 broke" in capsys.readouterr().err
    report = (tmp_path / "out" / "ablations.md").read_text()
    assert "| no_kl | 1 | 1.00 | +0.00 |" in report
    assert "no_kl: one seed only;" in report
    monkeypatch.setattr(stage_processes, "run", inner)
    commands.clear()
    main(study)
    assert len(commands) == 1


def test_what_can_not_run_is_refused_before_anything_runs(
    study: list[str], commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit):
            main([*study, *words])
        return capsys.readouterr().err

    assert "train.py pipeline --config configs/quickstart/pipeline.yaml" in refused(f"--base={tmp_path}/nowhere")
    assert "ablations: there is no file" in refused("--ablations=[unknown]")
    assert "processes is 0: it should be greater than 0." in refused("--processes=0")
    assert "seeds is []: it should have at least 1 item" in refused("--seeds=[]")
    assert commands == []
    main([*study, "--ablations=[k3]", "--seeds=[1]"])
    commands.clear()
    overlay = tmp_path / "configs" / "k3.yaml"
    overlay.write_text("# changed\n")
    assert "results of k3/seed-1 with other settings" in refused()
    overlay.write_text("# k3\n")
    base = json.loads((tmp_path / "base" / "pipeline.json").read_text())
    base["sft"]["identity"] = "another"
    (tmp_path / "base" / "pipeline.json").write_text(json.dumps(base))
    assert "results of default/seed-1, k3/seed-1 with other settings or from other exports" in refused()
    assert commands == []


def test_the_table_compares_the_last_quarter_by_seed(points: pd.DataFrame) -> None:
    finals = final_values(points)
    assert list(finals) == ["score", "KL"]  # in the order of METRICS; what no run has is left out
    assert finals["KL"].tolist() == [7.5] * 4  # updates 7 and 8 of 8
    assert {key: finals.loc[key, "score"] for key in SCORES} == SCORES
    rows = markdown_table(finals).splitlines()
    assert rows[0] == "| ablation | seeds | score | Δ | KL | Δ |"
    assert rows[2] == "| default | 2 | 1.50 (1.00 to 2.00) |  | 7.50 (7.50 to 7.50) |  |"
    assert rows[3] == "| no_kl | 2 | 4.25 (4.00 to 4.50) | +2.75 | 7.50 (7.50 to 7.50) | +0.00 |"


def test_differences_are_to_the_same_seed_of_the_default(points: pd.DataFrame) -> None:
    without = points[~((points["ablation"] == "default") & (points["seed"] == 2))]
    assert "| no_kl | 2 | 4.25 (4.00 to 4.50) | +3.00 |" in markdown_table(final_values(without))  # 4 - 1, seed 1 alone


def test_the_result_has_the_numbers_and_a_row_of_panels_per_ablation(points: pd.DataFrame, tmp_path: Path) -> None:
    write_result(points, tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "ablations.csv"), points)
    assert "one seed" not in (tmp_path / "ablations.md").read_text()
    plot = Image.open(tmp_path / "ablations.png").convert("RGB")
    assert any(red > 200 and green < 100 for _, (red, green, _) in plot.getcolors(2**24))  # the ablation

    more = pd.concat([points, points[points["ablation"] == "no_kl"].assign(ablation="k3")])
    more = pd.concat([more, more[more["metric"] == "KL"].assign(metric="gold score")])
    write_result(more[more["seed"] == 1], tmp_path)
    assert "Every run has one seed only" in (tmp_path / "ablations.md").read_text()
    width, height = Image.open(tmp_path / "ablations.png").size
    assert height > 1.4 * plot.height
    assert width > 1.3 * plot.width


def test_a_logged_stage_prints_into_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a/ppo ended with status 2, see .*ppo\.log"):
        Runner(tmp_path, logged=True).run_stage(Stage("a/ppo", command="report", takes={"nothing": 1}))
    assert "nothing" in (tmp_path / "a" / "ppo.log").read_text()


def test_ppo_with_and_without_a_kl_penalty(
    tmp_path: Path,
    model_path: str,
    reward_path: str,
    demonstration_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(words: list[str], log: Path) -> Ended:
        start = time.monotonic()
        main(words)
        return Ended(0, time.monotonic() - start, 0.0)

    monkeypatch.setattr(stage_processes, "run", run)
    takes = {
        "model.model_path": model_path, "model.reward_path": reward_path, "data.train.path": demonstration_file,
        "data.validation.path": demonstration_file, "data.validation.split": "train", "data.batch_size": 8,
        "data.micro_batch_size": 8, "model.ppo.critic_warmup": 0, "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1,
    }  # fmt: skip
    stage = json.dumps({"name": "ppo", "config": str(PPO), "takes": takes})
    words = [f"--stage={stage}", "--ablations=[no_kl_penalty]", "--seeds=[1]", f"--base={tmp_path}"]
    main(["ablate", *words, f"--run_dir={tmp_path}/out", f"--config_dir={STUDY.parent}"])
    config = yaml.safe_load((tmp_path / "out" / "no_kl_penalty" / "seed-1" / "config.yaml").read_text())
    assert flat(config)["model.ppo.kl_coefficient"] == 0
    points = pd.read_csv(tmp_path / "out" / "ablations.csv")
    assert set(points["metric"]) == set(METRICS)
    assert sorted(points["episodes"].unique()) == [0, 8]  # a validation before the first update
    assert points[points["metric"] == "EOS"]["value"].nunique() == 1  # the first rollout is the same with the same seed
