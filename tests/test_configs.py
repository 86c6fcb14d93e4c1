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
from rlhf.studies.recipe import SECTIONS, Recipe, Shared, evaluation_stages
from rlhf.studies.runner import Job, Runner, Stage, filled
from rlhf.synthetic.posts import comparisons, demonstrations

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = CONFIGS / "tldr"  # tested in tests/test_paper_configs.py
STAGES = sorted(f for f in CONFIGS.rglob("*.yaml") if f.parent != PAPER and "model:\n  class_path" in f.read_text())
BEFORE = {
    f"quickstart/{name}": [CONFIGS / "quickstart" / "ppo.yaml"] for name in ("lora", "rloo", "grpo")
}  # files that one only changes
STUDIES = sorted(f for f in CONFIGS.rglob("*.yaml") if {"stages", "sizes"} <= yaml.safe_load(f.read_text()).keys())
PIPELINES = sorted(f for f in CONFIGS.rglob("*.yaml") if {"sft", "run_dir"} <= yaml.safe_load(f.read_text()).keys())


def name(file: Path) -> str:
    return str(file.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize("file", STAGES, ids=name)
def test_a_stage_runs_for_a_step(file: Path, tmp_path: Path, model_path: str, write_jsonl: Callable[..., str]) -> None:
    files = [*BEFORE.get(name(file), []), file]
    config = yaml.safe_load(files[0].read_text())
    kind, data = config["model"]["class_path"], config["data"]["init_args"]
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(max(32, data["batch_size"]), 1, "train"))
    pairs = write_jsonl("comparisons.jsonl", comparisons(16, 1, "train"))
    words = [f"--run_dir={tmp_path}/run", f"--model.model_path={model_path}", "--trainer.accelerator=cpu"]
    words += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    for split in ("train", "validation", "demonstrations"):
        if split in data:
            source = pairs if kind in ("RewardModule", "DPOModule") and split != "demonstrations" else prompts
            words += [f"--data.{split}.path={source}", f"--data.{split}.split=train"]
    if kind == "PPOModule":
        ScalarModel.from_policy(model_path, 1).save(tmp_path / "reward", load_tokenizer(model_path))
        words += [f"--model.reward_path={tmp_path}/reward"]
    main(["fit", *(f"--config={each}" for each in files), *words])
    assert (tmp_path / "run" / "export" / "rlhf.json").is_file()


def stages_of(file: Path, part: str) -> list[Stage]:
    """A part of a study for its first size and the export after the first update, or the stages of a pipeline."""
    config = yaml.safe_load(file.read_text())
    if part == "stages" and file in PIPELINES:
        return composed(config)
    stages = [Stage(**row) for row in config.get(part, [])]
    if part == "stages":
        stages += evaluation_stages(config["evaluation"])
    return filled(stages, size=config["sizes"][0], update=1)


def composed(config: dict[str, Any]) -> list[Stage]:
    """The stages of a pipeline on files of one's own, or those that it names."""
    shared = {key: value for key, value in config.items() if key in Shared.__dataclass_fields__}
    given = {"model": "model", "demonstrations": "demonstrations.jsonl", "comparisons": "comparisons.jsonl"}
    given = given if "model" not in config else {}
    sections = {section: config.get(section) for section in SECTIONS}
    return Recipe(Shared(**given | shared), sections, size=config.get("size", "run")).stages()


@pytest.mark.parametrize("file", [*PIPELINES, *STUDIES], ids=name)
def test_a_pipeline_names_stages_and_settings_that_exist(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    known: dict[str, set[str]] = {}
    for place, part in (("shared", "shared"), ("base", "base"), ("run", "stages"), ("run", "checkpoints")):
        if file in PIPELINES and part != "stages":
            continue
        others = {name: tmp_path / name for name in known if name != place}
        runner = Runner(tmp_path / "run", CONFIGS.parent / config.get("config_dir", "."), others=others)
        for stage in stages_of(file, part):
            for folder, taken in re.findall(r"\{(\w+)\}/([^/\"]+)", json.dumps(stage.takes)):
                where = place if folder == "run" else folder
                assert taken.removesuffix(".parquet") in known[where], f"{stage.name} takes {taken}"
            known.setdefault(place, set()).add(stage.name)
            with pytest.raises(SystemExit, match="0"):
                main([*runner.words(stage), "--print_config"])
            capsys.readouterr()


@pytest.mark.parametrize("file", STUDIES, ids=name)
def test_a_study_reads_as_one(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    jobs: list[Job] = []
    monkeypatch.setattr(rlhf.studies.scaling, "run_jobs", lambda found, *rest: jobs.extend(found))
    main(["scaling", f"--config={file}", f"--run_dir={tmp_path}"])
    config = yaml.safe_load(file.read_text())
    assert len(jobs) == 1 + len(config["sizes"]) * (1 + len(config["seeds"]))
