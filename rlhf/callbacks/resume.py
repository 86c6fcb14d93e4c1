"""What a checkpoint was made with, and a run that goes on from it with what the user has typed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info

from rlhf.callbacks.checkpoint_io import read
from rlhf.errors import UserError

KEY = "rlhf"
SAMPLE = 2**16
Record = dict[str, list[str]]


def record(trainer: Any, module: Any) -> dict[str, Any]:
    """What a checkpoint was made with, for `on_save_checkpoint`; plain numbers and texts."""
    return {
        "must_agree": {name: [shown, compared] for name, shown, compared in _must_agree(trainer, module)},
        "processes": trainer.world_size,
        "parameter_groups": len(trainer.optimizers[0].param_groups),
        "accumulate": trainer.accumulate_grad_batches,
    }


def _must_agree(trainer: Any, module: Any) -> Iterator[tuple[str, str, str]]:
    """Settings without which a run can't go on: as the user names them, as they are shown, as they are compared."""
    data = trainer.datamodule
    for name, part in (("model", module), ("data", data)):
        yield name, type(part).__qualname__, type(part).__qualname__
    for name in ("model_path", "reference_path", "reward_path"):
        path = getattr(module, name, None)
        yield f"model.{name}", str(path), fingerprint(path)
    tokenizer = module.tokenizer
    tokens = f"{len(tokenizer)} tokens, PAD {tokenizer.pad_token_id}, EOS {tokenizer.eos_token_id}"
    yield "the tokenizer of model.model_path", tokens, tokens
    yield "data.batch_size", str(data.batch_size), str(data.batch_size)
    rows = data.splits["train"]
    some = [rows[n] for n in sorted({0, len(rows) // 2, len(rows) - 1})]
    yield "data.train", f"{len(rows)} rows", f"{len(rows)} {_digest(repr(some).encode())}"
    yield "seed_everything", str(module.seed), str(module.seed)


def fingerprint(path: str | None) -> str:
    """Of a model: for a folder, of samples of its files, wherever it lies; else its name."""
    if path is None or not Path(path).is_dir():
        return str(path)
    parts = []
    for file in sorted(f for pattern in ("config.json", "*.safetensors", "*.bin") for f in Path(path).glob(pattern)):
        size = file.stat().st_size
        with file.open("rb") as content:
            parts += [file.name.encode(), str(size).encode(), content.read(SAMPLE)]
            content.seek(max(0, size - SAMPLE))
            parts.append(content.read())
    return _digest(b"\0".join(parts))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Resume(Callback):
    """Lets a run go on from a checkpoint, or refuses with the setting that stands in the way.

    Settings that a run can go on with are those that are typed now, among them the learning rate and the other
    settings of the optimizer, which Lightning would take from the checkpoint.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._groups = 1
        self._typed: list[dict[str, Any]] = []
        self._typed_base: list[list[float]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Compare, before weights are loaded.

        Raises:
            UserError: the run can't go on from this checkpoint.
        """
        if stage != "fit":
            return
        found = read(self.path).get(KEY)
        if found is None:
            raise UserError(f"ckpt_path: {self.path} does not say what it was made with; it is not of this program.")
        own = {name: (shown, compared) for name, shown, compared in _must_agree(trainer, pl_module)}
        for name, (shown, compared) in found["must_agree"].items():
            now, compared_now = own.get(name, ("not set", ""))
            if compared_now != compared:
                change = f"{shown}, but now it is {now}" if shown != now else f"{shown}, which is no longer the same"
                raise UserError(
                    f"ckpt_path: the run of {self.path} can't go on: {name} was {change}. Set it back, or start "
                    "another run (--run_dir), which can take an export of this one as its model (docs/resuming.md)."
                )
        self._compare_processes(trainer, found["processes"])
        self._groups = found.get("parameter_groups", 1)

    def _compare_processes(self, trainer: Trainer, before: int) -> None:
        now, zero = trainer.world_size, isinstance(trainer.strategy, DeepSpeedStrategy)
        if self.path.is_dir() != zero:
            raise UserError(
                f"ckpt_path: {self.path} was written with{'out' * zero} ZeRO, and trainer.strategy is now one "
                f"with{'out' * (not zero)}; docs/resuming.md says how to go on from its weights."
            )
        if zero and now != before:
            raise UserError(
                f"ckpt_path: {self.path} is of {before} processes, and each has a part of it; now there are {now} "
                "(trainer.devices x trainer.num_nodes). docs/resuming.md says how to go on from its weights."
            )
        parts = len(list(self.path.glob("checkpoint/*optim_states.pt")))
        if zero and parts < before:
            raise UserError(f"ckpt_path: {self.path} has the parts of {parts} processes out of {before}.")
        if now != before:
            rank_zero_info(
                f"The checkpoint is of {before} processes, now there are {now}: the run goes on with the same "
                "examples, but not to the last bit, and PPO draws other samples."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Count in the micro-batches of this run; a checkpoint that was made of ZeRO's has no optimizer states."""
        checkpoint.setdefault("optimizer_states", [])
        before, now = checkpoint[KEY]["accumulate"], trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            missing, done = counts["ready"] - counts["completed"], counts["ready"] * now // before
            counts |= dict.fromkeys(counts, done) | {"completed": done - missing}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep what the user has typed, before it is overwritten; refuse an optimizer with other groups."""
        groups = trainer.optimizers[0].param_groups
        if len(groups) != self._groups:
            raise UserError(
                f"ckpt_path: the optimizer of {self.path} has {self._groups} groups of parameters, and now there are "
                f"{len(groups)}, so it was written by another version of this program; start another run (--run_dir), "
                "which can take an export of this one as its model (docs/resuming.md)."
            )
        self._typed = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._typed_base = [list(schedule.base_lrs) for schedule in schedules]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put it back; the learning rate stays where it is in its schedule."""
        groups = trainer.optimizers[0].param_groups
        for group, typed in zip(groups, self._typed, strict=True):
            group |= typed
        for config, typed_base in zip(trainer.lr_scheduler_configs, self._typed_base, strict=True):
            schedule = config.scheduler
            rates = zip(groups, schedule.get_last_lr(), schedule.base_lrs, typed_base, strict=True)
            for group, rate, base, typed_rate in rates:
                group["lr"] = rate if typed_rate == base else rate * typed_rate / base
            schedule.base_lrs = typed_base
