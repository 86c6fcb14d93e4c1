"""Fixture files in the public schemas, a cache that lives as long as the tests, and a stand-in for the Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transformers import GPTNeoXConfig

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of `datasets` below the temporary folder, and no question to the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def demonstrations_file() -> str:
    """Rows in the schema of `vwxyzjn/summarize_from_feedback_tldr_3_filtered`."""
    return str(FIXTURES / "demonstrations.jsonl")


@pytest.fixture(scope="session")
def comparisons_file() -> str:
    """Rows in the schema of `openai/summarize_from_feedback`, `comparisons`: three TL;DR, then two CNN/DM."""
    return str(FIXTURES / "comparisons.jsonl")


@pytest.fixture
def demos(demonstrations_file: str) -> list[dict[str, Any]]:
    """The demonstrations, to be changed by a test."""
    return [json.loads(line) for line in Path(demonstrations_file).read_text().splitlines()]


@pytest.fixture
def pairs(comparisons_file: str) -> list[dict[str, Any]]:
    """The comparisons, to be changed by a test."""
    return [json.loads(line) for line in Path(comparisons_file).read_text().splitlines()]


@pytest.fixture
def attach(tokenizer: Any) -> Callable[..., Any]:
    """Gives a DataModule a Trainer and sets it up; further keywords become attributes of the module."""

    def attach(
        datamodule: Any,
        stage: str = "fit",
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        max_epochs: int | None = 1,
        **module: Any,
    ) -> Any:
        defaults = {
            "tokenizer": tokenizer,
            "response_room": 4,
            "model_config": GPTNeoXConfig(),
            "embedding_rows": 512,
            "model_path": "here",
            "placements": (),
        }
        datamodule.trainer = SimpleNamespace(
            lightning_module=SimpleNamespace(
                **(defaults | module),
            ),
            state=SimpleNamespace(fn=stage),
            global_rank=rank,
            world_size=world_size,
            accumulate_grad_batches=accumulate,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            current_epoch=0,
            max_epochs=max_epochs,
            fit_loop=SimpleNamespace(
                epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0)))
            ),
        )
        datamodule.setup(stage)
        return datamodule

    return attach
