"""Every shipped config parses; stages run for a step. The ablations are tested in tests/studies/test_ablation.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf.studies.scaling
from rlhf.cli.main import main
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.studies.runner import Job, Runner, Stage, filled, with_takes
from rlhf.synthetic.posts import comparisons, demonstrations

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = CONFIGS / "tldr"  # tested in tests/test_paper_configs.py
STAGES = sorted(f for f in CONFIGS.rglob("*.yaml") if f.parent != PAPER and "model:\n  class_path" in f.read_text())
PIPELINES = sorted(f for f in CONFIGS.rglob("*.yaml") if "stages" in yaml.safe_load(f.read_text()))


def name(file: Path) -> str:
    return str(file.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("file", STAGES, ids=name)
def test_a_stage_runs_for_a_step(file: Path, tmp_path: Path, model_path: str, write_jsonl: Callable[..., str]) -> None:
    config = yaml.safe_load(file.read_text())
    kind, data = config["model"]["class_path"], config["data"]["init_args"]
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(max(32, data["batch_size"]), 1, "train"))
    pairs = write_jsonl("comparisons.jsonl", comparisons(16, 1, "train"))
    words = [f"--run_dir={tmp_path}/run", f"--model.model_path={model_path}", "--trainer.accelerator=cpu"]
    words += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    for split in ("train", "validation", "demonstrations"):
        if split in data:
            source = pairs if kind == "RewardModule" and split != "demonstrations" else prompts
            words += [f"--data.{split}.path={source}", f"--data.{split}.split=train"]
    if kind == "PPOModule":
        ScalarModel.from_policy(model_path, 1).save(tmp_path / "reward", load_tokenizer(model_path))
        words += [f"--model.reward_path={tmp_path}/reward"]
    main(["fit", f"--config={file}", *words])
    assert (tmp_path / "run" / "export" / "rlhf.json").is_file()


def stages_of(file: Path, part: str) -> list[Stage]:
    """A part of a pipeline, or of a study for its first size and the export after the first update."""
    config = yaml.safe_load(file.read_text())

    def read(part: str) -> list[Stage]:
        given = config.get(part, [])
        rows = yaml.safe_load((file.parent / given).read_text()) if isinstance(given, str) else given
        return [Stage(**row) for row in rows]

    stages = read(part)
    if part == "stages":
        stages += with_takes(read("evaluation"), config.get("evaluation_takes"))
    return filled(stages, size=config.get("sizes", [config.get("size", "run")])[0], update=1)


@pytest.mark.parametrize("file", PIPELINES, ids=name)
def test_a_pipeline_names_stages_and_settings_that_exist(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    known: dict[str, set[str]] = {}
    for place, part in (("shared", "shared"), ("base", "base"), ("run", "stages"), ("run", "checkpoints")):
        others = {name: tmp_path / name for name in known if name != place}
        runner = Runner(tmp_path / "run", CONFIGS.parent / config["config_dir"], others=others)
        for stage in stages_of(file, part):
            for folder, taken in re.findall(r"\{(\w+)\}/([^/\"]+)", json.dumps(stage.takes)):
                if folder == "configs":
                    assert (runner.config_dir / taken).exists(), f"{stage.name} takes {taken}"
                    continue
                where = place if folder == "run" else folder
                assert taken.removesuffix(".parquet") in known[where], f"{stage.name} takes {taken}"
            known.setdefault(place, set()).add(stage.name)
            with pytest.raises(SystemExit, match="0"):
                main([*runner.words(stage), "--print_config"])
            capsys.readouterr()


@pytest.mark.parametrize("file", [file for file in PIPELINES if "sizes" in yaml.safe_load(file.read_text())], ids=name)
def test_a_study_reads_as_one(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    jobs: list[Job] = []
    monkeypatch.setattr(rlhf.studies.scaling, "run_jobs", lambda found, *rest: jobs.extend(found))
    main(["scaling", f"--config={file}", f"--run_dir={tmp_path}"])
    config = yaml.safe_load(file.read_text())
    assert len(jobs) == 1 + len(config["sizes"]) * (1 + len(config["seeds"]))
