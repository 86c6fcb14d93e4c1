"""Prompts for PPO: every one once per pass, over ranks and updates (D03, D13, D23, D37)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.modules import PPOSettings

Attach = Callable[..., Any]


@pytest.fixture
def prompts_file(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(
        "prompts.jsonl", [{"prompt": f"Question {'very ' * (i % 3)}{i}?", "label": i} for i in range(20)]
    )


@pytest.fixture
def make(attach: Attach, prompts_file: str) -> Attach:
    """A RolloutDataModule over generic prompts."""

    def make(
        batch: int = 4,
        rank: int = 0,
        world_size: int = 1,
        rows: int = 20,
        micro: int = 1,
        ppo: Any = None,
        **module: Any,
    ) -> Any:
        source = Source(prompts_file, limit=rows)
        data = RolloutDataModule(source, source, batch_size=batch, micro_batch_size=micro, eval_batch_size=3)
        ppo = ppo or PPOSettings(ppo_epochs=2)
        return attach(data, rank=rank, world_size=world_size, ppo=ppo, **module)

    return make


def drawn(ranks: list[Any], updates: range) -> list[int]:
    """Row numbers in the order of the updates, all ranks."""
    return [row for update in updates for data in ranks for row in data.prompts_of(update)]


def test_defaults_are_the_papers() -> None:
    data = RolloutDataModule(Source("x"))
    assert (data.batch_size, data.text.max_query_length, data.text.max_response_length) == (512, 512, 53)


@pytest.mark.parametrize(
    ("rows", "batch", "world"), [(20, 4, 1), (20, 4, 2), (18, 6, 3), (20, 6, 2), (7, 6, 3), (5, 4, 1)]
)
def test_each_pass_holds_every_prompt_exactly_once(make: Attach, rows: int, batch: int, world: int) -> None:
    ranks = [make(batch, rank, world, rows) for rank in range(world)]
    assert all(len(data.prompts_of(u)) == batch // world for data in ranks for u in range(batch))
    for updates in range(1, rows + 1):
        sequence = drawn(ranks, range(updates))
        counts = [sequence.count(row) for row in range(rows)]
        assert sum(counts) == updates * batch
        assert max(counts) - min(counts) <= 1
    assert counts == [batch] * rows


def test_passes_are_shuffled_afresh(make: Attach) -> None:
    passes = [[sorted(drawn([make(4)], range(u, u + 1))) for u in range(n, n + 5)] for n in (0, 5, 10)]
    assert all(a != b for a, b in pairwise(passes))
    assert passes[0] != [list(range(n, n + 4)) for n in range(0, 20, 4)]


def test_ranks_get_long_and_short_prompts_alike(make: Attach) -> None:
    one = make(12)
    lengths = {row: len(one.splits["train"][row]["query_ids"]) for row in range(20)}
    ranks = [sorted(lengths[row] for row in make(12, rank, 3).prompts_of(0)) for rank in range(3)]
    ordered = sorted(lengths[row] for row in one.prompts_of(0))
    assert ranks == [ordered[rank::3] for rank in range(3)]


def test_the_prompts_of_an_update_depend_neither_on_history_nor_on_ranks(make: Attach) -> None:
    one = make(6)
    later = one.prompts_of(9)
    drawn([one], range(9))
    assert one.prompts_of(9) == later == make(6).prompts_of(9)
    for update in range(9):
        everyone = drawn([make(6, rank, 3) for rank in range(3)], range(update, update + 1))
        assert sorted(everyone) == sorted(one.prompts_of(update))


def test_generic_prompts_work_with_nothing_but_a_prompt(make: Attach, batch_of: Attach, tokenizer: Any) -> None:
    batch = batch_of(make(), "train", [2, 0])
    assert [text["query"] for text in batch["texts"]] == ["Question very very 2?", "Question 0?"]
    assert [text["reference"] for text in batch["texts"]] == ["", ""]
    assert [text["record"] for text in batch["texts"]] == [
        {"prompt": "Question very very 2?", "label": 2},
        {"prompt": "Question 0?", "label": 0},
    ]
    short = batch["query_mask"][1].bool()
    assert short.tolist() == sorted(short.tolist())
    assert not short[0]
    assert (batch["queries"][1][~short] == tokenizer.pad_token_id).all()
    assert tokenizer.decode(batch["queries"][1][short]) == "Question 0?"
    assert tokenizer.decode(batch["queries"][0]) == "Question very very 2?"


def test_tldr_prompts_need_no_summary(
    attach: Attach, batch_of: Attach, demos: list[Any], write_jsonl: Callable[..., str]
) -> None:
    with_summary, without = demos[0], {k: v for k, v in demos[1].items() if k != "summary"}
    for record, reference in ((with_summary, " " + with_summary["summary"]), (without, "")):
        source = Source(write_jsonl("tldr.jsonl", [record]))
        data = attach(RolloutDataModule(source, batch_size=1, micro_batch_size=1), ppo=PPOSettings())
        text = batch_of(data, "train", [0])["texts"][0]
        assert text["query"].endswith("\n\nTL;DR:")
        assert text["reference"] == reference
        assert text["record"] == record


def test_a_batch_larger_than_the_data_is_refused(make: Attach) -> None:
    assert make(4, rows=4).prompts_of(0)
    with pytest.raises(UserError, match=r"data\.batch_size 6 is larger than the 5 prompts.* Set it to 5 at most"):
        make(6, rows=5)


@pytest.mark.parametrize(("minibatches", "accumulate"), [(1, 6), (2, 3), (3, 2)])
def test_accumulation_counts_the_minibatches(make: Attach, minibatches: int, accumulate: int) -> None:
    data = make(12, micro=2, ppo=PPOSettings(minibatches=minibatches))
    assert data.trainer.accumulate_grad_batches == accumulate
    with pytest.raises(UserError, match="x 5 minibatches"):
        make(12, micro=2, ppo=PPOSettings(minibatches=5))


@pytest.mark.parametrize("world", [1, 2])
def test_validation_covers_the_whole_subset_once(make: Attach, world: int) -> None:
    ranks = [make(rank=rank, world_size=world) for rank in range(world)]
    for loaders in ([d.val_dataloader() for d in ranks], [d.test_dataloader() for d in ranks]):
        labels = [t["record"]["label"] for (batches,) in loaders for batch in batches for t in batch["texts"]]
        assert labels == [label for rank in range(world) for label in range(rank, 20, world)]


def test_without_validation_there_is_none_and_a_test_needs_a_split(make: Attach) -> None:
    data = make()
    del data.splits["validation"]
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match=r"data\.(test|validation)"):
        data.test_dataloader()


def test_a_rollout_gets_this_ranks_prompts_and_is_kept(make: Attach) -> None:
    calls: list[Any] = []
    kept: list[Any] = []

    def rollout(batch: dict[str, Any], update: int) -> str:
        kept.append(data.last_rollout)
        calls.append((batch, update))
        return f"rollout {update}"

    data = make(6, 1, 2, rollout=rollout, device=torch.device("cpu"))
    assert [data.make_rollout(3), data.make_rollout(4)] == ["rollout 3", "rollout 4"]
    assert data.last_rollout == "rollout 4"
    assert kept == [None, None]
    for (batch, update), number in zip(calls, (3, 4), strict=True):
        assert update == number
        assert [t["record"]["label"] for t in batch["texts"]] == data.prompts_of(number)
        assert batch["chunk"] == data.rollout_batch_size


def test_the_loader_follows_the_trainer_and_the_module(make: Attach) -> None:
    ppo = PPOSettings(minibatches=2, ppo_epochs=3)
    data = make(8, 1, 2, micro=1, ppo=ppo, reduce_sum=lambda tensor: tensor)
    loader = data.train_dataloader()
    assert len(loader) == 3 * 2 * 2
    assert (loader.rank, loader.world_size) == (1, 2)
    data.trainer.current_epoch = 7
    assert loader.update() == 7
