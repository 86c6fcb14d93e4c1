"""Batch sizes, and the rows of every rank (D13, D14)."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import re
import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.types import _Stateful

from rlhf.data import loaders
from rlhf.data.loaders import Plan, accumulation, train_plans
from rlhf.errors import UserError
from rlhf.modules import SFTModule

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("batch", "micro", "world", "parts", "expected"),
    [(512, 16, 8, 1, 4), (512, 1, 8, 1, 64), (128, 16, 1, 1, 8), (64, 8, 8, 1, 1), (512, 16, 2, 4, 4), (6, 1, 3, 2, 1)],
)
def test_accumulation_divides_exactly(batch: int, micro: int, world: int, parts: int, expected: int) -> None:
    assert accumulation(batch, micro, world, parts) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "world", "parts"),
    [(100, 16, 1, 1), (10, 3, 2, 1), (3, 4, 1, 1), (8, 2, 1, 3), (7, 2, 3, 1)],
)
def test_an_inexact_division_names_numbers_that_work(batch: int, micro: int, world: int, parts: int) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size {batch} .*data\.micro_batch_size {micro}") as error:
        accumulation(batch, micro, world, parts)
    named = re.search(r"use a multiple of (\d+)(.*)", str(error.value))
    assert named
    for number in [named[1], *re.findall(r"-?\d+", named[2])]:
        assert accumulation(int(number), micro, world, parts) >= 1


LENGTHS = [7, 90, 30, 31, 5, 64, 30, 12, 88, 41, 3]


def planned(rows: int, batch: int, accumulate: int, rank: int = 0, world: int = 1, epoch: int = 0) -> list[Plan]:
    weights, lengths = [10 + r for r in range(rows)], [LENGTHS[r % len(LENGTHS)] for r in range(rows)]
    return list(train_plans(weights, lengths, batch, accumulate, rank, world, epoch))


GRID = list(product((1, 2, 5, 12, 13, 23, 24, 25), (1, 2, 3), (1, 2), (1, 2)))


@pytest.mark.parametrize(("rows", "world", "micro", "accumulate"), GRID)
def test_every_row_once_per_epoch_over_all_ranks(rows: int, world: int, micro: int, accumulate: int) -> None:
    size = world * micro * accumulate
    ranks = [planned(rows, size, accumulate, rank, world) for rank in range(world)]
    count = math.ceil(rows / size) * accumulate
    assert [len(plans) for plans in ranks] == [count] * world
    plans = [plan for rank in ranks for plan in rank]
    assert sorted(row for plan in plans if plan.real for row in plan.rows) == list(range(rows))
    assert all(len(plan.rows) > 0 and (plan.real or len(plan.rows) == 1) for plan in plans)
    for step in range(0, count, accumulate):
        part = [plan for rank in ranks for plan in rank[step : step + accumulate]]
        own = [row for plan in part if plan.real for row in plan.rows]
        assert len(own) == size or step == count - accumulate
        if len(own) == size:
            assert all(plan.real for plan in part)
        assert max(sum(LENGTHS[r % 11] for r in plan.rows) for plan in part) <= micro * max(LENGTHS)
        assert [plan.share for plan in part] == [sum(10 + r for r in own) / (accumulate * world)] * len(part)


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_depend_neither_on_ranks_nor_on_accumulation(world: int) -> None:
    def steps(world: int, accumulate: int) -> list[set[int]]:
        ranks = [planned(23, 6, accumulate, rank, world) for rank in range(world)]
        return [
            {r for rank in ranks for plan in rank[i : i + accumulate] if plan.real for r in plan.rows}
            for i in range(0, len(ranks[0]), accumulate)
        ]

    assert steps(world, 1) == steps(1, 1) == steps(1, 3)


def test_each_epoch_has_an_order_of_its_own() -> None:
    orders = [[row for plan in planned(50, 10, 1, epoch=epoch) for row in plan.rows] for epoch in (0, 1, 2)]
    assert all(a != b for a, b in pairwise([list(range(50)), *orders]))
    assert planned(50, 10, 1) == planned(50, 10, 1, epoch=0)


# ------------------------------------------------------------------------------------------------- in all DataModules


@pytest.fixture(params=["sft", "reward"])
def make(request: pytest.FixtureRequest, attach: Make, sft_data: Make, preference_data: Make) -> Make:
    """A DataModule, set up."""
    kind = {"sft": sft_data, "reward": preference_data}[request.param]

    def make(eval_batch_size: int = 3, **trainer: Any) -> Any:
        return attach(kind(eval_batch_size=eval_batch_size), **trainer)

    return make


def plain(batches: Any) -> list[Any]:
    """Batches as values that can be compared."""
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in batches]


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5])
def test_a_resumed_epoch_goes_on_after_what_is_done(make: Make, done: int) -> None:
    data = make()
    data.trainer.current_epoch = 3
    whole = plain(data.train_dataloader())
    assert len(whole) == len(data.train_dataloader()) > 5
    data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = done
    assert plain(data.train_dataloader()) == whole[done:]


def test_the_rows_that_count_are_named(make: Make) -> None:
    batches = list(make().train_dataloader())
    assert sorted(row for batch in batches for row in batch["rows"]) == list(range(len(make().splits["train"])))


def test_lightning_takes_it_for_a_loader_that_can_resume(make: Make) -> None:
    assert isinstance(make().train_dataloader(), _Stateful)


@pytest.mark.parametrize("workers", [0, 2])
def test_iter_alone_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Lightning calls it before the Trainer knows the epoch."""
    monkeypatch.setitem(loaders.WORKERS, "cpu", workers)
    data = make()
    data.trainer.current_epoch = 1
    expected = plain(data.train_dataloader())
    data.trainer.current_epoch = 0
    batches = data.train_dataloader()
    before = multiprocessing.active_children()
    iter(batches)
    first = iter(batches)
    assert multiprocessing.active_children() == before
    data.trainer.current_epoch = 1
    assert plain(first) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_no_random_number(make: Make, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setitem(loaders.WORKERS, "cpu", workers)
    data = make()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_split_with_fewer_rows_than_processes_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="rows cannot be shared by 100 processes"):
        make(stage="validate", world_size=100).val_dataloader()


@pytest.mark.parametrize(("size", "world"), list(product((1, 3, 20), (1, 2, 3))))
def test_evaluation_covers_every_row_once(make: Make, size: int, world: int) -> None:
    for rank in range(world):
        data = make(size, stage="validate", rank=rank, world_size=world)
        rows = data.splits["validation"]
        batches = data.in_order(rows, lambda rows, real: {"records": [row["record"] for row in rows], "real": real})
        found = list(batches)
        assert len(found) == len(batches)
        assert all(batch["real"] and len(batch["records"]) <= size for batch in found)
        assert [record for batch in found for record in batch["records"]] == rows["record"][rank::world]


# ------------------------------------------------------------------------------------------------------------ workers


@pytest.mark.parametrize("split", ["train", "val"])
def test_workers_load_the_same_batches(make: Make, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    def batches() -> list[Any]:
        data = make()
        given = [data.train_dataloader()] if split == "train" else data.val_dataloader()
        assert {each.num_workers for each in given} == {loaders.WORKERS.get("cpu", 0)}
        return [plain(each) for each in given]

    expected = batches()
    monkeypatch.setitem(loaders.WORKERS, "cpu", 2)
    assert batches() == expected


def test_a_worker_may_be_spawned(make: Make) -> None:
    given = make().train_dataloader()
    plans = list(given.sampler)
    copy = pickle.loads(pickle.dumps(given.dataset))
    assert plain(copy[plan] for plan in plans) == plain(given)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_a_signal_that_stops_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Clusters send it to all processes, and the one that trains finishes its optimizer step before it stops."""
    monkeypatch.setitem(loaders.WORKERS, "cpu", 2)
    given = make().train_dataloader()
    monkeypatch.setattr(given, "prefetch_factor", 1)
    batches, others = iter(given), {*multiprocessing.active_children()}
    next(batches), next(batches)  # one of each worker, so both are ready
    workers = {*multiprocessing.active_children()} - others
    assert len(workers) == 2
    for worker in workers:
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    assert len(list(batches)) == len(given) - 2
    for worker in workers:
        worker.join(timeout=10)
        assert worker.exitcode is not None


def test_workers_end_when_their_parent_says_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does at exit, and then waits for them."""
    monkeypatch.setitem(loaders.WORKERS, "cpu", 2)
    batches, others = iter(make().train_dataloader()), {*multiprocessing.active_children()}
    next(batches), next(batches)
    for worker in {*multiprocessing.active_children()} - others:
        worker.terminate()
        worker.join(timeout=10)
        assert worker.exitcode == 0
    batches.close()


def test_a_run_with_workers_gives_the_same_weights(
    make: Make, model_path: str, trainer: Make, sft_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for workers in (0, 2):
        monkeypatch.setitem(loaders.WORKERS, "cpu", workers)
        module = SFTModule(model_path, response_length=4)
        trainer(max_epochs=2).fit(module, sft_data())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_overfit_batches_keeps_the_micro_batches(model_path: str, trainer: Make, sft_data: Make) -> None:
    """Lightning replaces samplers that do not seem to go in order."""
    data = sft_data()
    run = trainer(overfit_batches=2, max_epochs=2, limit_val_batches=0)
    run.fit(SFTModule(model_path, response_length=4), data)
    assert run.global_step == 2
    assert run.train_dataloader.sampler.count == 8
