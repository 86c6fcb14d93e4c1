"""Tries one update of a config, and shows all that can be known before hours are spent on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from statistics import median
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rlhf.callbacks.findings import INVARIANTS, Finding
from rlhf.callbacks.invariants import Invariants
from rlhf.callbacks.ppo_curves import peak_memory_gib
from rlhf.data.stage_data import StageDataModule
from rlhf.data.token_budget import workload
from rlhf.data.tokenising import lengths
from rlhf.errors import find_user_error
from rlhf.models.loading import embedding_rows
from rlhf.models.memory import estimate
from rlhf.modules import StageModule

Verdict = Literal["ok", "look", "wrong"]
GIB = 2**30
MANY_TRUNCATED = 0.05


@dataclass(frozen=True)
class Row:
    """One line of the table: `look` is worth a thought, `wrong` must be mended."""

    group: str
    what: str
    value: str
    verdict: Verdict = "ok"


class StageTrainer(Trainer):
    """A Trainer with one more verb."""

    def check(self, model: StageModule, datamodule: StageDataModule) -> None:
        """Try one update of a config and show what can be known of the whole run; nothing is written.

        Loads tokenizer, data and models, validates one batch, makes one update (SFT and reward model: two steps), and
        shows tokens, lengths, batch sizes, invariants, memory and time. The exit status is 1 when something is wrong.

        Args:
            model: the module of a stage.
            datamodule: its data.
        """
        watch, one = Watch.of(self), OneUpdate()
        self.callbacks += [watch, one]  # type: ignore[attr-defined]
        failure = ""
        try:
            self.fit(model, datamodule=datamodule)
        except torch.OutOfMemoryError:
            failure = "out of memory: lower data.micro_batch_size or data.rollout_batch_size"
        except Exception as error:
            known = find_user_error(error) or (error if isinstance(error, MisconfigurationException) else None)
            if known is None:
                raise
            failure = str(known)
        rows = [
            *token_rows(model, datamodule),
            *data_rows(datamodule),
            *batch_rows(self, model, datamodule),
            *finding_rows(watch),
            *rollout_rows(datamodule),
            *cost_rows(self, model, datamodule, one),
        ]
        rows.append(Row("run", "one update", failure or "done", "wrong" if failure else "ok"))
        if self.is_global_zero:
            show(rows, [str(f) for f in watch.findings.values() if not f.holds] + [failure])
        if any(row.verdict == "wrong" for row in rows):
            raise SystemExit(1)


class Watch(Invariants):
    """Records what it finds and goes on."""

    @classmethod
    def of(cls, trainer: Any) -> Watch:
        """In the place of the Trainer's own, with its settings."""
        watch = cls()
        for given in [c for c in trainer.callbacks if isinstance(c, Invariants)]:
            vars(watch).update({field.name: getattr(given, field.name) for field in fields(Invariants)})
            trainer.callbacks.remove(given)
        return watch

    def act(self, finding: Finding) -> None:
        """It is shown in the table."""


class OneUpdate(Callback):
    """Stops after one update of PPO, or after two steps, and times the last one.

    Attributes:
        seconds: of that update or step; 0 where it was not reached.
        total: updates or steps of the whole run.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.total = 0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The update begins."""
        self.total = pl_module.total_schedule_steps()
        self._start = self._now(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each step: the first one warms up."""
        if pl_module.schedule_interval == "step" and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            now = self._now(pl_module)
            self.seconds, self._start = now - self._start, now
            trainer.should_stop = batch_idx + 1 >= 2 * trainer.accumulate_grad_batches

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """After an update."""
        if pl_module.schedule_interval == "epoch":
            self.seconds = self._now(pl_module) - self._start
        trainer.should_stop = True

    @staticmethod
    def _now(module: Any) -> float:
        torch.get_device_module(module.device).synchronize()
        return time.perf_counter()


def token_rows(module: StageModule, data: StageDataModule) -> Iterator[Row]:
    """EOS, PAD, embedding, the end of the query."""
    tokenizer = module.tokenizer
    yield Row("tokens", "EOS", f"{tokenizer.eos_token!r}, id {tokenizer.eos_token_id}")
    yield Row("tokens", "PAD", f"{tokenizer.pad_token!r}, id {tokenizer.pad_token_id}")
    yield Row("tokens", "embedding", f"{embedding_rows(module.model_config)} rows for {len(tokenizer)} tokens")
    for split in data.splits.values():
        queries = split["query"][:100]
        spaces = sum(query != query.rstrip() for query in queries)
        text = f"{queries[0][-12:]!r}" + (f"; {spaces} of {len(queries)} end in white space" if spaces else "")
        yield Row("tokens", "end of a query", text, "look" if spaces else "ok")
        break


def data_rows(data: StageDataModule) -> Iterator[Row]:
    """Rows and lengths of every split, and how many responses are cut off."""
    for name, split in data.splits.items():
        if not len(split):
            continue
        columns = {"query_ids", "input_ids", "chosen_ids", "rejected_ids"} & set(split.column_names)
        parts = [f"{len(split)} rows"]
        for column in sorted(columns):
            counts = lengths(split, column)
            parts.append(f"{column.removesuffix('_ids')} {median(counts):.0f} tokens, at most {max(counts)}")
        yield Row("data", name, "; ".join(parts))
        cut = sum(split["truncated"][:])
        verdict: Verdict = "look" if cut > MANY_TRUNCATED * len(split) else "ok"
        yield Row("data", f"{name}: responses cut off", f"{cut} ({cut / len(split):.1%})", verdict)


def batch_rows(trainer: Any, module: Any, data: StageDataModule) -> Iterator[Row]:
    """How the batch divides; how it should stands in the error that refuses it."""
    accumulate, parts = trainer.accumulate_grad_batches, module.ppo.minibatches if hasattr(module, "ppo") else 1
    text = f"{data.batch_size} = {trainer.world_size} processes x {accumulate} micro-batches"
    if data.tokens is not None:
        yield Row("batch", "batch size", f"{text} of at most {data.tokens} tokens")
    elif trainer.world_size * accumulate * data.micro_batch_size * parts == data.batch_size:
        text += f" x {data.micro_batch_size}"
        yield Row("batch", "batch size", text + (f" x {parts} minibatches" if parts > 1 else ""))
    strategy = type(trainer.strategy).__name__
    yield Row("batch", "strategy", f"{strategy}, {trainer.precision}, {trainer.strategy.root_device}")


def finding_rows(watch: Invariants) -> Iterator[Row]:
    """The invariants that could be measured."""
    for name, known in INVARIANTS.items():
        if finding := watch.findings.get(name):
            text = f"{finding.value:.3g} (at most {finding.limit:.3g})"
            yield Row("invariants", f"{name} ({known.detail})", text, "ok" if finding.holds else "wrong")


def rollout_rows(data: Any) -> Iterator[Row]:
    """What the policy answers now; only where a rollout was finished."""
    rollout = getattr(data, "last_rollout", None)
    if rollout is None or not hasattr(rollout, "returns"):
        return
    share = rollout.has_eos.float().mean().item()
    yield Row("rollout", "responses with EOS", f"{share:.1%}", "look" if share < 0.5 else "ok")
    yield Row("rollout", "tokens per response", f"{rollout.lengths.float().mean().item():.1f}")
    yield Row("rollout", "score", f"{rollout.scores.mean().item():.3f}, std {rollout.scores.std().item():.3f}")


def cost_rows(trainer: Any, module: Any, data: Any, one: OneUpdate) -> Iterator[Row]:
    """Memory per process, and time."""
    if data.splits:
        wanted = estimate(module.model_config, workload(trainer, module, data))
        device = trainer.strategy.root_device
        text = f"{wanted.peak / GIB:.2f} GiB in the phase {wanted.peak_phase!r}"
        verdict: Verdict = "ok"
        if device.type == "cuda":
            room = torch.cuda.get_device_properties(device).total_memory
            text += f" of {room / GIB:.0f} GiB"
            verdict = "ok" if wanted.peak < room else "look"
        yield Row("cost", "memory per process, estimated", text, verdict)
    if not one.seconds:
        return
    measured = "of the device" if module.device.type == "cuda" else "of the whole process"
    yield Row("cost", "peak memory, measured", f"{peak_memory_gib(module.device):.2f} GiB {measured}")
    unit = "update" if module.schedule_interval == "epoch" else "step"
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in getattr(module, "seconds", {}).items())
    yield Row("cost", f"one {unit}", f"{one.seconds:.2f} s" + (f" ({phases}, the rest training)" if phases else ""))
    whole = timedelta(seconds=round(one.seconds * one.total))
    yield Row("cost", "the whole run", f"{whole} for {one.total} {unit}s, without validation")


def show(rows: list[Row], sentences: list[str]) -> None:
    """Print the table, and below it what is wrong in whole sentences."""
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "look": "yellow", "wrong": "bold red"}
    table = Table("", "what", "found", "", title="Check")
    before = ""
    for row in rows:
        if before and row.group != before:
            table.add_section()
        group = row.group if row.group != before else ""
        before = row.group
        table.add_row(group, row.what, row.value, f"[{colours[row.verdict]}]{row.verdict}[/]")
    console = Console(emoji=False, highlight=False)
    console.print(table)
    for sentence in filter(None, sentences):
        console.print(f"wrong: {sentence}", markup=False, style="red")
