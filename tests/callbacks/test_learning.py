"""Each sign that nothing is learnt is found on a run that has it, and on no sound one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rlhf import files
from rlhf.callbacks.learning import Learning
from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.sources import Source
from rlhf.modules import Optimization, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.sampling.rollout import Rollout
from rlhf.synthetic.posts import comparisons, demonstrations

Make = Callable[..., Any]
NEVER, SOUND = 1e-12, 2e-3


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings of Lightning are no subject here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def sft(model_path: str, trainer: Make, sft_data: Make, write_jsonl: Make) -> Make:
    """Trains SFT for 20 steps on 40 demonstrations; returns the callback."""

    def sft(rate: float, module: type[SFTModule] = SFTModule, resume: Path | None = None, **settings: Any) -> Learning:
        watch, file = Learning(), write_jsonl("forty.jsonl", demonstrations(40, 1, "train"))
        data = sft_data(batch_size=2, micro_batch_size=2)
        data.sources |= {"train": Source(file), "validation": Source(file)}
        optimization = Optimization(learning_rate=rate, schedule="constant")
        t = trainer(callbacks=[watch, *settings.pop("callbacks", [])], **settings)
        t.fit(module(model_path, response_length=4, optimization=optimization), data, ckpt_path=resume)
        return watch

    return sft


class Ends(SFTModule):
    """Every response ends at once."""

    def respond(self, batch: dict[str, Any], batch_idx: int) -> tuple[list[str], list[bool]]:
        number = len(batch["query"])
        return [""] * number, [True] * number


def test_sft_that_does_not_move(sft: Make, tmp_path: Path) -> None:
    watch = sft(NEVER)
    assert set(watch.found) == {"learning_rate", "loss", "no_eos"}
    assert "after 20 steps" in watch.found["loss"]
    assert "of SFT ends with EOS: 0 of 40" in watch.found["no_eos"]
    assert json.loads((tmp_path / "run" / files.FINDINGS).read_text()) == watch.found


def test_sft_that_learns(sft: Make, tmp_path: Path) -> None:
    assert sft(SOUND, Ends).found == {}
    assert not (tmp_path / "run" / files.FINDINGS).exists()


def test_sft_that_diverges(sft: Make) -> None:
    assert "The loss rose" in sft(3.0, Ends).found["loss"]


def test_a_run_that_is_too_short_to_tell(sft: Make) -> None:
    assert set(sft(NEVER, limit_train_batches=9).found) == {"learning_rate", "no_eos"}
    assert set(sft(NEVER, limit_train_batches=9, limit_val_batches=2).found) == {"learning_rate"}  # 32 responses


def test_nothing_is_written_in_a_dry_run(sft: Make, tmp_path: Path) -> None:
    assert set(sft(NEVER, fast_dev_run=True).found) == {"learning_rate"}
    assert not (tmp_path / "run" / files.FINDINGS).exists()


class Stop(Exception):  # noqa: N818
    """The end of a process."""


class Stops(SFTModule):
    """Ends after 14 steps."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 14:
            raise Stop


def test_a_resumed_run_goes_on_from_what_it_knew(sft: Make, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=12, filename="stopped")
    with pytest.raises(Stop):
        sft(NEVER, Stops, enable_checkpointing=True, callbacks=[checkpoint])
    file = tmp_path / "run" / files.FINDINGS
    assert set(json.loads(file.read_text())) == {"learning_rate", "loss"}  # half of the training
    file.unlink()
    watch = sft(SOUND, resume=tmp_path / "kept" / "stopped.ckpt", limit_val_batches=0)
    assert set(json.loads(file.read_text())) == set(watch.found) == {"loss"}
    assert "after 20 steps" in watch.found["loss"]  # against what it was before the first step


@pytest.fixture
def reward(model_path: str, trainer: Make, write_jsonl: Make) -> Make:
    """Trains a reward model on 64 pairs of a clear and a garbled response; returns the callback."""

    def reward(rate: float) -> Learning:
        pairs = list(islice(comparisons(64, 1, "validation", 0), 64))
        for pair in pairs:
            pair["summaries"][1 - pair["choice"]]["text"] = " no no no no"
        source = Source(write_jsonl("pairs.jsonl", pairs))
        data = PreferenceDataModule(source, source, batch_size=4, micro_batch_size=4)
        watch, optimization = Learning(), Optimization(learning_rate=rate, schedule="constant")
        trainer(callbacks=[watch]).fit(RewardModule(model_path, optimization=optimization), data)
        return watch

    return reward


def test_a_reward_model_that_learns_and_one_that_does_not(reward: Make) -> None:
    assert reward(SOUND).found == {}
    assert "loss" in reward(NEVER).found


@pytest.fixture
def ppo(model_path: str, reward_path: str, trainer: Make, rollout_data: Make) -> Make:
    """Runs updates of PPO; returns the callback."""

    def ppo(
        updates: int, episodes: int = 8, rate: float = SOUND, module: type[PPOModule] = PPOModule, **settings: Any
    ) -> Learning:
        watch, optimization = Learning(), Optimization(learning_rate=rate, schedule="constant")
        t = trainer(max_epochs=updates, limit_val_batches=0, callbacks=[watch])
        details = PPOSettings(response_length=4, **{"ppo_epochs": 1, "missing_eos_score": None} | settings)
        data = rollout_data(batch_size=episodes, micro_batch_size=8, rollout_batch_size=episodes)
        t.fit(module(model_path, reward_path, ppo=details, optimization=optimization), data)
        return watch

    return ppo


def test_ppo_that_learns(ppo: Make) -> None:
    assert ppo(7).found == {}


def test_a_policy_that_does_not_move(ppo: Make) -> None:
    assert set(ppo(6, rate=NEVER).found) == {"learning_rate", "no_kl"}
    assert set(ppo(5, rate=NEVER).found) == {"learning_rate"}  # too short to tell
    assert "no_kl" not in ppo(6, rate=NEVER, critic_warmup=2).found  # the policy has had four updates


class OneScore(PPOModule):
    """Its reward tells nothing."""

    def score_responses(self, episodes: Rollout) -> Tensor:
        return torch.full((len(episodes),), 0.5)


def test_scores_that_are_all_equal(ppo: Make) -> None:
    found = ppo(2, 32, module=OneScore).found
    assert list(found) == ["equal_scores"]
    assert "The scores of the last 64 episodes are all equal (0.500 in update 2)" in found["equal_scores"]
    assert ppo(1, 32, module=OneScore).found == {}  # a rare success may be yet to come


class NoEnd(PPOModule):
    """Never samples EOS."""

    def sample_responses(self, queries: Tensor, *args: Any) -> Tensor:
        return torch.full((len(queries), self.ppo.response_length), 5)


def test_rollouts_without_eos_count_under_the_eos_trick(ppo: Make) -> None:
    found = ppo(2, 32, module=NoEnd, missing_eos_score=-1.0).found
    assert set(found) == {"no_eos", "equal_scores"}
    assert "of the rollouts ends with EOS: 0 of 64" in found["no_eos"]
    assert "no_eos" not in ppo(2, 32, module=NoEnd).found


class Idle(Learning):
    """Looks at no training batch."""

    def on_train_batch_start(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("module", "data"), [(SFTModule, "sft_data"), (RewardModule, "preference_data")])
def test_looking_changes_no_bit_of_the_training(
    module: Any, data: str, model_path: str, trainer: Make, request: pytest.FixtureRequest
) -> None:
    trained = []
    for watch in (Learning(), Idle()):
        watched = module(model_path, optimization=Optimization(learning_rate=SOUND))
        trainer(callbacks=[watch], max_epochs=4, limit_val_batches=0).fit(watched, request.getfixturevalue(data)())
        trained.append(torch.nn.utils.parameters_to_vector(watched.parameters()))
    assert torch.equal(*trained)
