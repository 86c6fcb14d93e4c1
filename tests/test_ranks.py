"""Two processes on this machine, started as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.data.synthetic import demonstrations
from rlhf.evaluation.curves import read_curves
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar_model import ScalarModel

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fit(tmp_path: Path, model_path: str, write_jsonl: Callable[..., str]) -> Callable[..., Path]:
    """Runs a quickstart stage with some number of processes; returns its run folder."""
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(30, 1, "train"))

    def fit(stage: str, devices: int, *words: str) -> Path:
        run = tmp_path / f"{stage}-{devices}"
        command = [
            sys.executable, str(ROOT / "train.py"), "fit", f"--config={ROOT}/configs/quickstart/{stage}.yaml",
            f"--run_dir={run}", f"--model.model_path={model_path}", f"--data.train.path={prompts}",
            "--data.validation=null", "--data.batch_size=8", "--data.micro_batch_size=2",
            "--trainer.accelerator=cpu", f"--trainer.devices={devices}", "--trainer.strategy=ddp", *words,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return run

    return fit


def test_sft_gives_the_same_weights_on_one_and_on_two_processes(fit: Callable[..., Path]) -> None:
    one, two = (load_file(fit("sft", n) / "export" / "model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)


def test_ppo_on_two_processes(fit: Callable[..., Path], model_path: str, tmp_path: Path) -> None:
    ScalarModel.from_policy(model_path, 3).save(tmp_path / "reward", load_tokenizer(model_path))
    words = [f"--model.reward_path={tmp_path}/reward", "--model.ppo.response_length=6", "--trainer.max_epochs=2"]
    curves = read_curves(fit("ppo", 2, *words))
    assert curves["episode"].tolist() == [8, 16]
    assert curves["val/ratio_max_deviation"].max() < 1e-5
    assert curves["objective/kl"].iloc[0] == pytest.approx(0, abs=1e-4)
    expected = curves["objective/scores"] + curves["objective/non_score_reward"]
    assert curves["objective/rlhf_reward"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert (curves["val/num_eos_tokens"] / 8).tolist() == pytest.approx(curves["rollout/eos_share"].tolist())
