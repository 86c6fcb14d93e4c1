"""The CPU runs ahead of a GPU: it waits once per optimizer step, and in decoding every eighth step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from rlhf.models.loading import load_causal_lm
from rlhf.modules import DPOModule, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.ops.sequences import response_lengths
from rlhf.sampling import sampler
from rlhf.sampling.sampler import LOOK_EVERY, Decoding, sample
from tests.waits import GPU, counted

Make = Callable[..., Any]


class Steps(Callback):
    """Keeps the waits of every optimizer step, from the start of its first micro-batch to that of the next step's."""

    def __init__(self, waits: list[str]) -> None:
        self.waits, self.steps = waits, []

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        pl_module.on_train_batch_start = self.begin  # after what callbacks do there with a whole rollout

    def begin(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            if batch_idx:
                self.end()
            self.start = len(self.waits)

    def end(self) -> None:
        self.steps.append(self.waits[self.start :])

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self.end()


@pytest.fixture
def steps(trainer: Make, device: str, model_path: str, reward_path: str, request: pytest.FixtureRequest) -> Make:
    """Trains a stage for two epochs with two micro-batches per step; returns the waits of each step."""

    def run(kind: str) -> list[list[str]]:
        ppo = PPOSettings(response_length=8, ppo_epochs=2)
        module, data = {
            "sft": lambda: (SFTModule(model_path), "sft_data"),
            "reward": lambda: (RewardModule(model_path), "preference_data"),
            "dpo": lambda: (DPOModule(model_path), "preference_data"),
            "ppo": lambda: (PPOModule(model_path, reward_path, ppo=ppo), "rollout_data"),
        }[kind]()
        with counted(device) as waits:
            seen = Steps(waits)
            precision = "32-true" if device == "cpu" else "bf16-mixed"  # in which rows are packed
            t = trainer(max_epochs=2, limit_val_batches=0, callbacks=[seen], precision=precision)
            if device == "cpu":
                t.strategy._root_device = GPU
            t.fit(module, request.getfixturevalue(data)())
        return seen.steps

    return run


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo"])
def test_once_per_optimizer_step(kind: str, steps: Make) -> None:
    found = steps(kind)
    assert len(found) >= 4
    for waits in found[1:]:  # the first forwards of a model find out what it can do
        assert len(waits) == 1, waits


def test_once_in_eight_decoding_steps(model_path: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not counted is transformers, which looks at the mask in every step if no fixed cache is used."""
    model = load_causal_lm(model_path).to(torch.device(device))
    rows = torch.randint(3, 400, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    numbers = torch.rand(4, 64, dtype=torch.float64)
    inputs = [x.to(device) for x in (*rows, numbers)]
    decoding = Decoding(1.0, list(range(0, 500, 40)), 1)  # rows end at different steps
    expected = sample(model, *inputs, decoding)
    assert len(set(response_lengths(expected, decoding.eos_ids)[0].tolist())) > 2
    monkeypatch.setattr(sampler, "LOOKS", {})
    with counted(device) as waits:
        if device == "cpu":
            model, inputs = model.to(GPU), [x.to(GPU) for x in inputs]
            waits.clear()
        found = sample(model, *inputs, decoding)
        own = [wait for wait in waits if "rlhf/" in wait]
    assert found.tolist() == expected.tolist()
    assert len(own) <= expected.shape[1] / LOOK_EVERY + 4, own  # the ids of EOS, the cut, and rows that leave
