"""Every shipped config parses; stages run for a step. The ablations are tested in tests/evaluation/test_ablation.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli import main
from rlhf.data.synthetic import comparisons, demonstrations
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar_model import ScalarModel

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = CONFIGS / "tldr"  # tested in tests/test_paper_configs.py
STAGES = sorted(
    f
    for f in CONFIGS.rglob("*.yaml")
    if f.parent != PAPER and "class_path" in yaml.safe_load(f.read_text()).get("model", {})
)
PIPELINES = sorted(CONFIGS.rglob("pipeline.yaml"))


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


@pytest.mark.parametrize("file", PIPELINES, ids=name)
def test_a_pipeline_names_stages_and_settings_that_exist(file: Path) -> None:
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    known: set[str] = set()
    for stage in config["stages"]:
        own = yaml.safe_load((CONFIGS.parent / config["config_dir"] / stage["config"]).read_text())
        for key, value in stage.get("takes", {}).items():
            assert value.removeprefix("{run}/").split("/")[0] in known
            target = own
            for part in key.split("."):
                target = target.get("init_args", target)
                assert part in target, f"{stage['name']} takes {key}, which its config does not have"
                target = target[part]
        known.add(stage["name"])
