"""The paper's configs: its numbers, its batch arithmetic on 8 GPUs, and each of them at work on a small GPT-NeoX."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli import main
from rlhf.data.batches import accumulation
from rlhf.data.synthetic import comparisons, demonstrations
from rlhf.evaluation.curves import read_curves
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar_model import ScalarModel
from rlhf.pipeline import Runner, Stage

FOLDER = Path(__file__).parent.parent / "configs" / "tldr"
SIZES = ["1b", "2.8b", "6.9b"]
STAGES = ["sft", "reward", "ppo"]
PAIRS = list(product(STAGES, SIZES))
EXAMPLES = {"sft": (116_722, 128), "reward": (92_858, 64), "ppo": (1_000_000, 512)}


def words(stage: str, size: str) -> list[str]:
    return [f"--config={FOLDER}/{name}.yaml" for name in ("common", stage, f"{stage}_{size}")]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], dict[str, Any]]:
    """The whole config of a stage, as the command line understands it."""

    def printed(stage: str, size: str) -> dict[str, Any]:
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *words(stage, size), "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return printed


@pytest.mark.parametrize(("stage", "size"), PAIRS)
def test_the_numbers_are_the_papers(stage: str, size: str, printed: Callable[..., dict[str, Any]]) -> None:
    config = printed(stage, size)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert config["seed_everything"] == 44413
    assert (trainer["devices"], trainer["strategy"], trainer["precision"]) == (8, "zero2", "bf16-mixed")
    examples, batch = EXAMPLES[stage]
    assert data["batch_size"] == batch
    optimization = model["optimization"]
    assert (optimization["learning_rate"], optimization["eps"]) == (3e-6, 1e-5)
    assert optimization["schedule"] == ("linear" if stage == "ppo" else "cosine")
    assert optimization["warmup_steps"] == 0
    assert trainer["max_epochs"] == (examples // batch if stage == "ppo" else 1)
    accumulate = accumulation(batch, data["micro_batch_size"], 8)
    assert accumulate * data["micro_batch_size"] * 8 == batch
    if stage == "ppo":
        expected = {"1b": (16, 4, 64), "2.8b": (4, 16, 32), "6.9b": (1, 64, 4)}[size]
        assert (data["micro_batch_size"], accumulate, data["rollout_batch_size"]) == expected
        place = "cpu" if size == "6.9b" else "device"
        assert (model["reference_placement"], model["reward_placement"]) == (place, place)
        assert (model["ppo"]["ppo_epochs"], model["ppo"]["minibatches"]) == (4, 1)
    if stage == "sft":
        assert model["model_path"] == f"EleutherAI/pythia-{size}-deduped"


def test_what_the_sizes_share_stands_once() -> None:
    for stage, size in PAIRS:
        own = yaml.safe_load((FOLDER / f"{stage}_{size}.yaml").read_text())
        shared = yaml.safe_load((FOLDER / f"{stage}.yaml").read_text())
        for room in ("model", "data"):
            assert not set(own[room]["init_args"]) & set(shared[room]["init_args"])
        assert "trainer" not in own


@pytest.mark.parametrize("size", SIZES)
def test_a_pipeline_runs_its_three_stages_with_a_seed(size: str, tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / f"pipeline_{size}.yaml").read_text())
    runner = Runner(tmp_path, FOLDER, seed=55513)
    for stage in config["stages"]:
        line, _, finished = runner.plan(Stage(**stage))
        assert not finished
        assert [Path(word).name for word in line[2:8:2]] == ["common.yaml", *stage["config"][1:]]
        assert stage["config"][1:] == [f"{stage['name']}.yaml", f"{stage['name']}_{size}.yaml"]
        assert "--seed_everything=55513" in line


@pytest.mark.parametrize("script", sorted((FOLDER.parent / "cluster").glob("*.sh")), ids=lambda file: file.name)
def test_the_scripts_for_clusters_start_a_run_that_parses(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER.parent.parent)
    show = 'function srun { shift 2; echo "$@"; }; function torchrun { shift 11; echo "$@"; };'
    shell = f"set -e; NODES=2; NODE=0; HEAD=localhost; SLURM_NNODES=2; {show} source {script}"
    line = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.split()
    with pytest.raises(SystemExit, match="0"):
        main([*line, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["trainer"]["num_nodes"], config["trainer"]["devices"]) == (2, 8)
    assert config["model"]["init_args"]["reward_placement"] == "cpu"


@pytest.mark.parametrize(("stage", "size"), PAIRS)
def test_two_steps_on_a_small_model(
    stage: str, size: str, tmp_path: Path, model_path: str, write_jsonl: Callable[..., str]
) -> None:
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(24, 1, "train"))
    pairs = write_jsonl("comparisons.jsonl", comparisons(16, 1, "train"))
    source = {"limit": "16", "name": "null", "revision": "null", "split": "train"}
    given = [f"--model.model_path={model_path}", f"--run_dir={tmp_path}/run", "--data.batch_size=8"]
    given += ["--data.micro_batch_size=2", "--data.eval_batch_size=8"]
    for split in ("train", "validation", *(["demonstrations"] if stage == "reward" else [])):
        path = pairs if stage == "reward" and split != "demonstrations" else prompts
        given += [f"--data.{split}.{key}={value}" for key, value in {"path": path, **source}.items()]
    given += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    if stage == "ppo":
        ScalarModel.from_policy(model_path, 1).save(tmp_path / "reward", load_tokenizer(model_path))
        given += [f"--model.reward_path={tmp_path}/reward", "--trainer.max_epochs=2"]
        given += ["--model.ppo.response_length=6", "--data.rollout_batch_size=4"]
    elif stage == "sft":
        given += ["--model.response_length=4"]
    main(["fit", *words(stage, size), *given])
    assert (tmp_path / "run" / "export" / "rlhf.json").is_file()
    if stage == "ppo":
        curves = read_curves(tmp_path / "run")
        assert curves["episode"].tolist() == [8, 16]
        assert curves["val/ratio_max_deviation"].max() < 0.25  # bfloat16
