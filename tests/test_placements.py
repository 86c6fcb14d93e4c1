"""Where the frozen models live changes no number: on the device, in CPU memory, or shared out by ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import demonstrations
from rlhf.synthetic.synthesize import SmallModel, create_model

ROOT = Path(__file__).parent.parent
Fit = Callable[..., tuple[set[int], str]]


@pytest.fixture
def fit(tmp_path: Path, tokenizer: Any, write_jsonl: Callable[..., str], driver: Callable[..., list[int]]) -> Fit:
    """Two updates of PPO on two processes; the weights are large enough for ZeRO-3 to cut them into parts.

    Returns the exit statuses of the processes and what they printed.
    """
    model_path = str(tmp_path / "model")
    create_model(Path(model_path), tokenizer, SmallModel(hidden_size=256, layers=2, heads=2), seed=1)
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(17, 1, "train"))
    ScalarModel.from_policy(model_path, 3).save(tmp_path / "reward", load_tokenizer(model_path))

    def fit(placement: str, *words: str, processes: int = 2) -> tuple[set[int], str]:
        command = [
            "fit", f"--config={ROOT}/configs/quickstart/ppo.yaml", f"--run_dir={tmp_path}/{placement}",
            f"--model.model_path={model_path}", f"--model.reward_path={tmp_path}/reward",
            f"--data.train.path={prompts}", "--data.batch_size=8",
            f"--data.validation={{path: {prompts}, limit: 8}}", "--data.micro_batch_size=2",
            "--data.rollout_batch_size=2", "--data.eval_batch_size=2", "--model.ppo.response_length=6",
            "--model.ppo.critic_warmup=0", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2",
            "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=zero2",
            f"--model.reference_placement={placement}", f"--model.reward_placement={placement}", *words,
        ]  # fmt: skip
        log = tmp_path / f"{placement}.log"
        return set(driver(command, processes, log)), log.read_text()

    return fit


def test_every_placement_gives_the_same_scores(fit: Fit, tmp_path: Path) -> None:
    curves = {}
    for placement in ("device", "zero3"):
        statuses, printed = fit(placement, *(["--model.reward_placement=cpu"] if placement == "device" else []))
        assert statuses == {0}, printed[-3000:]
        curves[placement] = read_curves(tmp_path / placement)
    for name in ("objective/scores", "objective/kl", "loss/policy_avg", "validation/score"):
        expected = curves["device"][name].dropna().tolist()
        assert expected
        assert curves["zero3"][name].dropna().tolist() == pytest.approx(expected, abs=1e-4)
    assert abs(curves["device"]["objective/scores"]).min() > 0.01


def test_zero3_needs_batches_in_equal_numbers(fit: Fit) -> None:
    statuses, printed = fit("zero3", "--data.validation.limit=9")
    assert statuses == {2}
    assert "set data.validation.limit to a multiple of 2" in printed


def test_zero3_needs_deepspeed(fit: Fit) -> None:
    statuses, printed = fit("zero3", "--trainer.strategy=auto", "--trainer.devices=1", processes=1)
    assert statuses == {2}
    assert "need trainer.strategy zero2" in printed
