"""A stage in a few lines: records, a DataModule, a Trainer on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch import Trainer

from rlhf.data.domains import NEWS
from rlhf.data.preference import PreferenceDataModule
from rlhf.data.records import Source
from rlhf.data.rollout import RolloutDataModule
from rlhf.data.sft import SFTDataModule
from rlhf.data.synthetic import comparisons, demonstrations
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar_model import ScalarModel


@pytest.fixture
def demonstration_file(write_jsonl: Callable[..., str]) -> str:
    """32 demonstrations."""
    return write_jsonl("demonstrations.jsonl", demonstrations(32, 1, "train"))


@pytest.fixture
def comparison_file(write_jsonl: Callable[..., str]) -> str:
    """24 comparisons, 8 of them news."""
    news = islice(comparisons(8, 1, "validation", 0, NEWS, "cnndm"), 8)
    return write_jsonl("comparisons.jsonl", [*comparisons(16, 1, "validation", 0), *news])


@pytest.fixture
def reward_path(model_path: str, tmp_path: Path) -> str:
    """A reward model with a random head and a shift."""
    model = ScalarModel.from_policy(model_path, seed=3)
    model.bias.data.fill_(0.25)
    folder = tmp_path / "reward_model"
    model.save(folder, load_tokenizer(model_path))
    return str(folder)


@pytest.fixture
def sft_data(demonstration_file: str) -> Callable[..., SFTDataModule]:
    """An SFTDataModule over the demonstrations."""

    def make(**settings: Any) -> SFTDataModule:
        source = Source(demonstration_file)
        defaults: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 16}
        return SFTDataModule(source, source, **(defaults | settings))

    return make


@pytest.fixture
def preference_data(comparison_file: str, demonstration_file: str) -> Callable[..., PreferenceDataModule]:
    """A PreferenceDataModule over the comparisons."""

    def make(**settings: Any) -> PreferenceDataModule:
        source = Source(comparison_file)
        defaults: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 16}
        return PreferenceDataModule(source, source, demonstrations=Source(demonstration_file), **(defaults | settings))

    return make


@pytest.fixture
def rollout_data(demonstration_file: str) -> Callable[..., RolloutDataModule]:
    """A RolloutDataModule over the demonstrations."""

    def make(**settings: Any) -> RolloutDataModule:
        source = Source(demonstration_file)
        defaults: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "rollout_batch_size": 4}
        return RolloutDataModule(source, Source(demonstration_file, limit=6), **(defaults | settings))

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet Trainer on the CPU, from a fixed seed."""

    def make(**settings: Any) -> Trainer:
        L.seed_everything(7, verbose=False)
        defaults: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path / "run",
        }  # fmt: skip
        return Trainer(**(defaults | settings))

    return make
