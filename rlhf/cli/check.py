"""Tries one update of a config, and shows all that can be known before hours are spent on it."""

import json
import math
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rlhf.callbacks.findings import INVARIANTS
from rlhf.callbacks.invariants import Invariants
from rlhf.callbacks.learning import Learning
from rlhf.cli.parsing import message_of
from rlhf.data.chat import conversation_of
from rlhf.data.quality import overlap, quality_issues
from rlhf.data.stage_data import StageDataModule
from rlhf.data.token_budget import ROOM, workload
from rlhf.data.tokenising import lengths
from rlhf.errors import UserError
from rlhf.hardware import GIB, device_memory, peak_memory_gib
from rlhf.models.adapter_files import base_name
from rlhf.models.classifiers import register_classifier
from rlhf.models.learning_rates import proposed_learning_rate
from rlhf.models.memory import estimate, pinned, trained_parameters
from rlhf.models.tokenizers import eos_disagreement, eos_ids
from rlhf.modules import DPOModule, StageModule
from rlhf.protocols import has_critic

COLOURS = {"ok": "green", "look": "yellow", "wrong": "bold red"}


class Row(NamedTuple):
    """One line of the table: `look` deserves a look, `wrong` must be fixed."""

    group: str
    what: str
    value: str
    verdict: Literal["ok", "look", "wrong"] = "ok"


class StageTrainer(Trainer):
    """A Trainer that can also check a config."""

    def check(self, model: StageModule, datamodule: StageDataModule) -> None:
        """Tries one update of a config and shows what can be known of the whole run; nothing is written.

        Loads tokenizer, data and models, validates one batch, makes one update (SFT and reward model: two steps), and
        shows tokens, lengths, batch sizes, invariants, memory and time. The exit status is 1 if something is wrong.

        Args:
            model: the module of a stage.
            datamodule: its data.
        """
        given: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        invariants, one_update = next((c for c in given if isinstance(c, Invariants)), Invariants()), OneUpdate()
        learning = Learning(quiet=True)
        invariants.act = lambda finding: None  # type: ignore[method-assign]  # the table shows it
        given += [one_update, learning, *([] if invariants in given else [invariants])]
        failure: str | None = None
        try:
            self.fit(model, datamodule=datamodule)
        except torch.OutOfMemoryError:
            failure = "out of memory: lower data.micro_batch_size or data.rollout_batch_size"
        except Exception as error:
            failure = message_of(error)
            if failure is None:
                raise
        rows = [
            *_token_rows(model, datamodule),
            *_later_rows(model),
            *_adapter_rows(model),
            *_data_rows(datamodule),
            *_batch_rows(self, model, datamodule),
            *_finding_rows(invariants),
            *_learning_rows(learning),
            *_rollout_rows(datamodule, learning),
            *_cost_rows(self, model, datamodule, one_update),
            Row("run", "one update", failure or "done", "wrong" if failure else "ok"),
        ]
        if self.is_global_zero:
            broken = [str(finding) for finding in invariants.findings.values() if not finding.holds]
            _show(rows, wrong=[*broken, *filter(None, [failure])], look=list(learning.found.values()))
        if any(row.verdict == "wrong" for row in rows):
            raise SystemExit(1)


class OneUpdate(Callback):
    """Stops after one update of PPO, or after two steps, and times the last one."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of that update or step; 0 if it was not reached
        self._start = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DPOModule):
            pl_module.reference_batches = 2 * trainer.accumulate_grad_batches

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = _now(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.schedule_interval == "step" and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            now = _now(pl_module)
            self.seconds, self._start = now - self._start, now  # the first step warms up
            trainer.should_stop = batch_idx + 1 >= 2 * trainer.accumulate_grad_batches

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.schedule_interval == "epoch":
            self.seconds = _now(pl_module) - self._start
        trainer.should_stop = True


def _now(module: LightningModule) -> float:
    torch.get_device_module(module.device).synchronize()
    return time.perf_counter()


def _token_rows(module: StageModule, data: StageDataModule) -> Iterator[Row]:
    tokenizer = module.tokenizer
    ends = "; ".join(f"{tokenizer.convert_ids_to_tokens(id_)!r}, id {id_}" for id_ in eos_ids(tokenizer))
    other = "" if module.eos_tokens else eos_disagreement(tokenizer, module.model_path, "model.model_path")
    yield Row("tokens", "EOS", f"{ends}; {other}" if other else ends, "look" if other else "ok")
    pad, same = f"{tokenizer.pad_token!r}, id {tokenizer.pad_token_id}", tokenizer.pad_token == tokenizer.bos_token
    yield Row("tokens", "PAD", f"{pad}; it is BOS, too" if same else pad, "look" if same else "ok")
    rows, added = module.model_config.get_text_config().vocab_size, ""
    if module.embedding_rows > rows:
        added = f"; {module.embedding_rows - rows} added by model.resize_embeddings"
    yield Row("tokens", "embedding", f"{rows} rows for {len(tokenizer)} tokens{added}")
    for split in [*data.splits.values()][:1]:
        queries = split["query"][:100]
        if conversation_of(json.loads(split["record"][0])):
            queries = tokenizer.batch_decode(split["query_ids"][:100])  # with what the template writes
        spaces = sum(query != query.rstrip(" \t") for query in queries)
        text = f"; {spaces} of {len(queries)} end in a blank" if spaces else ""
        yield Row("tokens", "end of a query", f"{queries[0][-12:]!r}{text}", "look" if spaces else "ok")


def _later_rows(module: StageModule) -> Iterator[Row]:
    if module.kind != "sft":
        return
    try:
        whose = "this package" if register_classifier(module.model_config) else "transformers"
        yield Row("later stages", "reward model and critic", f"their class is from {whose}")
    except UserError as error:
        yield Row("later stages", "reward model and critic", str(error), "look")


def _adapter_rows(module: StageModule) -> Iterator[Row]:
    if module.lora is None:
        return
    config, kind, critic = module.model_config, module.kind, has_critic(module)
    adapters, whole = (trained_parameters(config, kind, lora, critic) for lora in (module.lora, None))
    trained = f"{adapters:,} parameters, {adapters / whole:.2%} of all; exported: {module.lora.export}"
    yield Row("adapters", "trained", trained)
    paths = {"model.model_path": module.model_path, "model.reward_path": getattr(module, "reward_path", None)}
    bases = sorted({base_name(path, setting) for setting, path in paths.items() if path is not None})
    more = f"; {len(bases)} bases in memory, as the reward model is no adapter on the policy's" * (len(bases) > 1)
    yield Row("adapters", "base", f"{', '.join(bases)}, stored as {module.quantization or 'it is'}{more}")


def _data_rows(data: StageDataModule) -> Iterator[Row]:
    for name, split in data.splits.items():
        if not len(split):
            continue
        parts = [f"{len(split)} rows"]
        for column in sorted({"query_ids", "input_ids", "chosen_ids", "rejected_ids"} & set(split.column_names)):
            counts = lengths(split, column)
            parts.append(f"{column.removesuffix('_ids')} {median(counts):.0f} tokens, at most {max(counts)}")
        yield Row("data", name, "; ".join(parts))
        cut = sum(split["truncated"][:])
        share = cut / len(split)
        for issue in quality_issues(split, data.text.special_tokens == "control"):
            yield Row("data", f"{name}: {issue.what}", f"{issue.found} ({issue.found / len(split):.1%})", "look")
        if name not in ("train", "demonstrations") and (again := overlap(split, data.splits["train"])):
            yield Row("data", f"{name}: records of train", f"{again} ({again / len(split):.1%})", "look")
        yield Row("data", f"{name}: responses cut off", f"{cut} ({share:.1%})", "look" if share > 0.05 else "ok")


def _batch_rows(trainer: Trainer, module: StageModule, data: StageDataModule) -> Iterator[Row]:
    accumulate, parts = trainer.accumulate_grad_batches, getattr(getattr(module, "ppo", None), "minibatches", 1)
    text = f"{data.batch_size} = {trainer.world_size} processes x {accumulate} micro-batches"
    if data.tokens is not None:
        yield Row("batch", "batch size", f"{text} of at most {data.tokens} tokens")
    elif trainer.world_size * accumulate * data.micro_batch_size * parts == data.batch_size:  # else it is an error
        minibatches = f" x {parts} minibatches" if parts > 1 else ""
        yield Row("batch", "batch size", f"{text} x {data.micro_batch_size}{minibatches}")
    name, device = type(trainer.strategy).__name__, trainer.strategy.root_device
    yield Row("batch", "strategy", f"{name}, {trainer.precision}, {device}")


def _finding_rows(invariants: Invariants) -> Iterator[Row]:
    for name, known in INVARIANTS.items():
        if finding := invariants.findings.get(name):
            text = f"{finding.value:.3g} (at most {finding.limit:.3g})"
            yield Row("invariants", f"{name} ({known.detail})", text, "ok" if finding.holds else "wrong")


def _learning_rows(learning: Learning) -> Iterator[Row]:
    if learning.parameters:
        proposed = proposed_learning_rate(learning.parameters, learning.adapters)
        of, rate = "adapters on " * learning.adapters, learning.learning_rate
        text = f"{rate:.1e}; usual for {of}{learning.parameters:,} parameters: about {proposed:.1e}"
        yield Row("learning", "learning rate", text, "look" if "learning_rate" in learning.found else "ok")


def _rollout_rows(data: StageDataModule, learning: Learning) -> Iterator[Row]:
    rollout = getattr(data, "last_rollout", None)
    if rollout is None:
        return
    share = rollout.has_eos.float().mean().item()
    yield Row("rollout", "responses with EOS", f"{share:.1%}", "look" if share < 0.5 else "ok")
    yield Row("rollout", "tokens per response", f"{rollout.lengths.float().mean().item():.1f}")
    score = f"{rollout.scores.mean().item():.3f}, std {rollout.scores.std(correction=0).item():.3f}"
    yield Row("rollout", "score", score, "look" if "equal_scores" in learning.found else "ok")


def _cost_rows(trainer: Trainer, module: StageModule, data: StageDataModule, one_update: OneUpdate) -> Iterator[Row]:
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    if data.splits:
        run = workload(trainer, module, data)
        estimated = estimate(module.model_config, run)
        phase = max(estimated, key=lambda name: estimated[name].total)
        wanted, room = estimated[phase].total, device_memory(device, 1) if on_gpu else math.inf
        text = f"{wanted / GIB:.2f} GiB in the phase {phase!r}"
        text += f" of {room / GIB:.0f} GiB" if on_gpu else ""
        yield Row("cost", "memory per process, estimated", text, "ok" if wanted < room else "look")
        if on_gpu:
            yield from _pinned_rows(pinned(module.model_config, run), trainer.num_devices)
    if not one_update.seconds:
        return
    measured = "of the device" if on_gpu else "of the whole process"
    yield Row("cost", "peak memory, measured", f"{peak_memory_gib(device):.2f} GiB {measured}")
    unit = "update" if module.kind == "ppo" else "step"
    phases = "".join(f"{name} {seconds:.2f} s, " for name, seconds in getattr(module, "seconds", {}).items())
    text = f" ({phases}the rest training)" if phases else ""
    yield Row("cost", f"one {unit}", f"{one_update.seconds:.2f} s{text}")
    total = module.total_schedule_steps()
    whole = timedelta(seconds=round(one_update.seconds * total))
    yield Row("cost", "the whole run", f"{whole} for {total} {unit}s, without validation")


def _pinned_rows(size: int, processes: int) -> Iterator[Row]:
    wanted, room = size * processes, device_memory(torch.device("cpu"), 1)
    if wanted:
        text = f"{wanted / GIB:.2f} GiB of {room / GIB:.0f} GiB for placement cpu ({processes} x {size / GIB:.2f} GiB)"
        if wanted > ROOM * room:
            text += "; zero3 holds each model once per machine or less"
        yield Row("cost", "CPU memory, pinned", text, "ok" if wanted <= ROOM * room else "look")


def _show(rows: list[Row], wrong: list[str], look: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", "", title="Check")
    for group, members in groupby(rows, lambda row: row.group):
        table.add_section()
        for n, row in enumerate(members):
            table.add_row("" if n else group, row.what, row.value, f"[{COLOURS[row.verdict]}]{row.verdict}[/]")
    console = Console(emoji=False, highlight=False)
    console.print(table)
    for verdict, style, sentences in (("look", "yellow", look), ("wrong", "red", wrong)):
        for sentence in sentences:
            console.print(f"{verdict}: {sentence}", markup=False, style=style)
