"""Methods compared: which stages run, what becomes of their tables, and the whole of it on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image, ImageColor

from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.report import charts
from rlhf.studies.baselines import summary, write_result
from rlhf.studies.processes import Ended, stage_processes
from rlhf.studies.runner import Runner, Stage
from rlhf.synthetic.posts import comparisons, demonstrations

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "configs" / "baselines" / "study.yaml"


def value_of(words: list[str], key: str) -> str | None:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{key}=")), None)


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    """Words for a study of two methods with two exports each, and of best-of-n."""
    for name in ("sft", "reward", "ppo", "dpo"):
        (tmp_path / f"{name}.yaml").write_text(f"# {name}\n")
    stages = [{"name": name, "config": f"{name}.yaml"} for name in ("sft", "reward")]
    methods = {name: {"name": name.lower(), "config": f"{name.lower()}.yaml",
                      "takes": {"model.model_path": "{run}/sft/export"}} for name in ("PPO", "DPO")}  # fmt: skip
    return ["baselines", f"--stages={json.dumps(stages)}", f"--methods={json.dumps(methods)}", "--seeds=[1, 2]",
            '--samples={"temperature": 0.7}', "--best_of=[4, 1]", f"--run_dir={tmp_path}/out",
            f"--config_dir={tmp_path}"]  # fmt: skip


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stages write exports and tables instead of doing what they should; keeps their commands.

    Gold score and reward of an answer are the number of updates or n, plus a tenth of the seed.
    """
    seen: list[list[str]] = []

    def run(words: list[str], log: Path) -> Ended:
        seen.append(words)
        if folder := value_of(words, "run_dir"):
            own = ("export", "export-2", "export-10") if Path(folder).name in ("ppo", "dpo") else ("export",)
            for export in (Path(folder) / name for name in own):
                export.mkdir(parents=True)
                (export / "rlhf.json").write_text("{}")
            return Ended(0, 0.0, 0.0)
        output, update = Path(str(value_of(words, "output"))), str(value_of(words, "model")).rpartition("-")[2]
        number = float(value_of(words, "best_of") or (update if update.isdigit() else 1))
        number += float(str(value_of(words, "seed"))) / 10
        table = {"query": ["a", "b"], "kl": [0.0, number], "score": [number - 1, number + 1], "gold": [number] * 2}
        pd.DataFrame(table).to_parquet(output)
        return Ended(0, 0.0, 0.0)

    monkeypatch.setattr(stage_processes, "run", run)
    return seen


def test_every_method_with_every_seed_and_finished_stages_are_skipped(
    study: list[str], commands: list[list[str]], tmp_path: Path
) -> None:
    main(study)
    first = f"{tmp_path}/out/seed-1"
    own = [words for words in commands if any(first in word for word in words)]
    made = [str(value_of(words, "run_dir") or value_of(words, "output")).removeprefix(f"{first}/") for words in own]
    exports = [[method, f"{method}_2.parquet", f"{method}_10.parquet"] for method in ("ppo", "dpo")]
    assert made == ["sft", "reward", "best_of_1.parquet", "best_of_4.parquet", *exports[0], *exports[1]]
    assert "--seed_everything=1" in own[0]
    common = {f"--reward={first}/reward/export", "--seed=1", "--temperature=0.7"}
    assert common | {f"--model={first}/sft/export", "--best_of=4"} <= {*own[3]}
    assert common | {f"--model={first}/ppo/export-10", f"--reference={first}/sft/export"} <= {*own[6]}
    assert not any("reference" in word for word in own[3])
    assert common | {f"--model={first}/sft/export", f"--reference={first}/sft/export"} <= {*own[2]}

    points = pd.read_csv(tmp_path / "out" / "baselines.csv").set_index(["method", "seed", "point"])
    assert len(points) == 2 * (2 + 2 + 2)
    assert points.loc[("DPO", 2, 10)].tolist() == pytest.approx([5.1, 10.2, 10.2])  # kl, gold, score
    row = "| best-of-n | 4 | 2 | 2.08 (2.05 to 2.10) | 4.15 (4.10 to 4.20) | 4.15 (4.10 to 4.20) |"
    assert row in (tmp_path / "out" / "baselines.md").read_text()
    commands.clear()
    main([*study, "--seeds=[1, 2, 3]", "--processes=2", "--best_of=[1, 4, 16]"])
    assert sum("--seed_everything=3" in words for words in commands) == 4
    assert sum(value_of(words, "best_of") == "16" for words in commands) == 3
    assert len(commands) == 4 + 3 + 2 + 4  # and seed 3's other answers


def test_a_failed_seed_is_left_out_and_another_is_not(
    study: list[str], commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    inner = stage_processes.run

    def run(words: list[str], log: Path) -> Ended:
        if f"--run_dir={tmp_path}/out/seed-1/dpo" in words:
            raise UserError("dpo broke")
        return inner(words, log)

    monkeypatch.setattr(stage_processes, "run", run)
    with pytest.raises(SystemExit):
        main(study)
    assert "1 of 3 jobs failed; the same command resumes them:\ndpo broke" in capsys.readouterr().err
    assert set(pd.read_csv(tmp_path / "out" / "baselines.csv")["seed"]) == {2}
    monkeypatch.setattr(stage_processes, "run", inner)
    main(study)
    assert set(pd.read_csv(tmp_path / "out" / "baselines.csv")["seed"]) == {1, 2}


def test_what_can_not_run_is_refused_before_anything_runs(
    study: list[str], commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (['--stages=[{"name": "sft", "config": "sft.yaml"}]'], "stages: reward must be among them"),
        (['--methods={"PPO": {"name": "ppo", "config": "none.yaml"}}'], "stages.ppo.config: there is no file"),
        (["--methods={}"], "methods"),
        (["--best_of=[0]"], "best_of"),
    ):
        with pytest.raises(SystemExit):
            main([*study, *words])
        assert sentence in capsys.readouterr().err
    assert commands == []


def test_a_method_without_exports_is_told_what_it_lacks(
    study: list[str], commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*study, '--methods={"PPO": {"name": "plain", "config": "ppo.yaml"}}'])
    assert "methods.PPO: " in (said := capsys.readouterr().err)
    assert "has no export-<n>; give the callback rlhf.callbacks.export.Export an every_n_epochs." in said


def test_the_figure_has_every_point_and_a_line_through_the_means(tmp_path: Path) -> None:
    rows = [("best-of-n", s, n, np.log(n), n / 10, n) for s in (1, 2) for n in (1, 4)]
    rows += [("PPO", s, u, u + s, s, u) for s in (1, 2) for u in (8, 16)]
    points = pd.DataFrame(rows, columns=["method", "seed", "point", "kl", "score", "gold"])
    panels = charts.against_kl(points, {"gold": "gold score", "score": "reward"})
    assert list(panels) == ["gold score", "reward"]
    dots, lines = (pd.DataFrame(layer["data"]["values"]) for layer in panels["reward"].to_dict()["layer"])
    pd.testing.assert_frame_equal(dots[["method", "kl", "score"]], points[["method", "kl", "score"]], check_dtype=False)
    assert lines.set_index(["method", "point"]).loc[("PPO", 8), ["kl", "score"]].tolist() == [9.5, 1.5]
    write_result(points, tmp_path)
    picture = np.asarray(Image.open(tmp_path / "baselines.png").convert("RGB"), int)
    for colour in charts.COLOURS[:2]:
        assert (np.abs(picture - ImageColor.getrgb(colour)).max(-1) < 5).any()
    assert list(summary(points.drop(columns="gold"))) == ["method", "point", "seeds", "KL", "reward"]


def test_the_shipped_study_names_stages_and_settings_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config: dict[str, Any] = yaml.safe_load(STUDY.read_text())
    assert len(config["seeds"]) >= 4
    runner = Runner(tmp_path / "run", ROOT / config["config_dir"], seed=1, others={"shared": tmp_path}, writes=False)
    answers = Stage("answers", "generate", takes={"model": "model", **config["samples"]})
    stages = [Stage(**stage) for part in ("shared", "stages") for stage in config[part]]
    stages += [Stage(**stage) for stage in config["methods"].values()]
    for stage in [*stages, answers]:
        with pytest.raises(SystemExit, match="0"):
            main([*runner.words(stage), "--print_config"])
        capsys.readouterr()


def test_a_tiny_study(
    tmp_path: Path, model_path: str, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(words: list[str], log: Path) -> Ended:
        main(words)
        return Ended(0, 0.0, 0.0)

    monkeypatch.setattr(stage_processes, "run", run)
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(8, 1, "train"))
    pairs = write_jsonl("comparisons.jsonl", comparisons(8, 1, "train"))
    small = {"data.batch_size": 8, "data.micro_batch_size": 8, "trainer.accelerator": "cpu", "trainer.max_epochs": 1,
             "data.validation": None}  # fmt: skip
    export = [{"class_path": "rlhf.callbacks.export.Export", "init_args": {"every_n_epochs": 1}}]
    method = {"model.model_path": "{run}/sft/export", "data.train.path": prompts, "trainer.callbacks": export, **small}
    rate = {"model.optimization.learning_rate": 0.01, "model.ppo.critic_warmup": 0}
    stages = [
        {"name": "sft", "config": "sft.yaml",
         "takes": {"model.model_path": model_path, "data.train.path": prompts, **small}},
        {"name": "reward", "config": "reward.yaml",
         "takes": {"model.model_path": "{run}/sft/export", "data.train.path": pairs, "data.demonstrations": None,
                   **small}},
    ]  # fmt: skip
    ppo = {"name": "ppo", "config": "ppo.yaml", "takes": {"model.reward_path": "{run}/reward/export", **method, **rate}}
    samples = {"data.path": prompts, "response_length": 6, "temperature": 0.7}
    main(["baselines", f"--stages={json.dumps(stages)}", f"--methods={json.dumps({'PPO': ppo})}", "--seeds=[1]",
          f"--samples={json.dumps(samples)}", "--best_of=[1, 4]", f"--run_dir={tmp_path}/out",
          f"--config_dir={ROOT}/configs/quickstart"])  # fmt: skip
    points = pd.read_csv(tmp_path / "out" / "baselines.csv").set_index(["method", "point"])
    assert points.loc[("best-of-n", 4), "score"] > points.loc[("best-of-n", 1), "score"]
    assert points.loc["best-of-n", "kl"].tolist() == pytest.approx([0.0, np.log(4) - 0.75])
    assert abs(points.loc[("PPO", 1), "kl"]) > 1e-3
    assert points["gold"].notna().all()
