"""What a step must not depend on: padding on the left, the order of records in a batch, micro-batch sizes and
token budgets.

The number of processes is in test_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.models.adapters import LoRA
from rlhf.modules import DPOModule, Optimization, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.sampling.rollout import Rollout
from rlhf.synthetic.posts import comparisons, demonstrations

Make = Callable[..., Any]
STEP = Optimization(learning_rate=1e-3, eps=1e-3)  # with a small eps the rounding of a tiny gradient makes a large step
ROWS = 8
GROUPS: dict[str, Any] = {
    "advantage": "group_normalised", "samples_per_prompt": 2, "kl_in": "loss", "kl_estimator": "k3", "temperature": 1.0,
}  # fmt: skip
PAIRS = {"reward": RewardModule, "dpo": DPOModule}
STAGES = ["sft", "reward", "dpo", "ppo"]


class FixedResponses(PPOModule):
    """Responses are a function of the prompt, so they do not depend on its place in the batch."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *_: Any) -> Tensor:
        width = self.ppo.response_length
        number = (queries * query_mask).sum(1, keepdim=True)
        columns = torch.arange(width).expand(len(queries), -1)
        tokens = 10 + (number + 37 * columns) % 400
        return tokens.masked_fill(columns == number % (width + 1), self.tokenizer.eos_token_id)


class MorePadding(RolloutDataModule):
    """Pads queries by seven columns more than the longest needs."""

    def pad_queries(self, queries: list[list[int]]) -> dict[str, Tensor]:
        batch = super().pad_queries(queries)
        pad = {"queries": self.tokenizer.pad_token_id, "query_mask": 0}
        return {name: torch.nn.functional.pad(x, (7, 0), value=pad[name]) for name, x in batch.items()}


class Sizes(Callback):
    """Notes the tokens of every micro-batch, padding included."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ppo = isinstance(batch, Rollout)
        self.seen.append(len(batch) * max(batch.total_lengths()) if ppo else batch["input_ids"].numel())


@pytest.fixture
def step(
    model_path: str, reward_path: str, trainer: Make, write_jsonl: Callable[..., str], request: pytest.FixtureRequest
) -> Make:
    """The weights after one optimizer step (PPO: one update) on eight records.

    `seen` are the tokens of the micro-batches of the last one, `longest` those of the longest example, by stage.
    """

    def step(stage: str, backwards: bool = False, rollout: type = RolloutDataModule, **sizes: int) -> Tensor:
        stage, _, variant = stage.partition(" ")
        lora = LoRA(rank=4) if variant == "adapters" else None
        records = list((comparisons if stage in PAIRS else demonstrations)(ROWS, 1, "train"))
        file = write_jsonl(f"{stage}-{backwards}.jsonl", reversed(records) if backwards else records)
        settings: dict[str, Any] = {"batch_size": ROWS, "micro_batch_size": 4} | sizes
        data: Any
        if stage == "sft":
            module: Any = SFTModule(model_path, optimization=STEP, lora=lora)
            data = SFTDataModule(Source(file), **settings)
        elif stage in PAIRS:
            module = PAIRS[stage](model_path, optimization=STEP, lora=lora)
            data = PreferenceDataModule(Source(file), **settings)
        else:
            groups = variant == "groups"  # which are sampled: that depends on the place in the batch alone
            kind, more = (PPOModule, GROUPS) if groups else (FixedResponses, {})
            ppo = PPOSettings(response_length=6, ppo_epochs=1, **more)
            module = kind(model_path, reward_path, ppo=ppo, optimization=STEP, lora=lora)
            data = rollout(Source(file), **({"rollout_batch_size": 4} | settings))
        seen.clear()
        trainer(callbacks=[Sizes(seen)]).fit(module, data)
        longest[stage] = max(length for rows in data.step_lengths(1) for length in rows)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    seen: list[int] = []
    longest: dict[str, int] = {}
    vars(step).update(seen=seen, longest=longest)
    return step


def start(stage: str, model_path: str, reward_path: str) -> Tensor:
    modules = {"sft": SFTModule, **PAIRS, "ppo": PPOModule}
    module = modules[stage](model_path, **({"reward_path": reward_path} if stage == "ppo" else {}))
    module.configure_model()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("stage", STAGES)
def test_the_order_of_records_does_not_matter(step: Make, stage: str, model_path: str, reward_path: str) -> None:
    expected = step(stage)
    torch.testing.assert_close(step(stage, backwards=True), expected, atol=2e-6, rtol=0)
    assert (expected - start(stage, model_path, reward_path)).abs().max() > 5e-4  # a step was made


@pytest.mark.parametrize(
    ("stage", "micro"), [*product([*STAGES, "ppo groups"], [1, 8]), *((f"{stage} adapters", 1) for stage in STAGES)]
)
def test_the_micro_batch_size_does_not_matter(step: Make, stage: str, micro: int) -> None:
    sizes = {"rollout_batch_size": 8 // micro} if stage.startswith("ppo") else {}
    torch.testing.assert_close(step(stage, micro_batch_size=micro, **sizes), step(stage), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("stage", "rows"),
    [*product(STAGES, [1, 3, 100]), *((f"{stage} adapters", 3) for stage in STAGES), ("ppo groups", 3)],
)
def test_a_token_budget_does_not_matter(step: Make, stage: str, rows: int) -> None:
    """Budgets of so many of the longest examples; the micro-batches are others than without one, and within it."""
    expected, without = step(stage), list(step.seen)
    budget = rows * step.longest[stage.split()[0]]
    found = step(stage, max_tokens_per_micro_batch=budget)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert max(step.seen) <= budget
    assert step.seen != without


def test_the_amount_of_left_padding_does_not_matter(step: Make) -> None:
    torch.testing.assert_close(step("ppo", rollout=MorePadding), step("ppo"), atol=2e-6, rtol=0)
