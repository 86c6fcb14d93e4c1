"""What a checkpoint was made with, and a run that resumes from it with the settings that the user gives now."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from rlhf import files
from rlhf.callbacks.checkpoint_io import check_parts, read
from rlhf.errors import UserError
from rlhf.models.loading import model_fingerprint
from rlhf.models.tokenizers import eos_ids
from rlhf.protocols import stage, stage_data

KEY = "rlhf"
ANOTHER_RUN = "start another run (--run_dir), which can take an export of this one as its model (docs/resuming.md)."


def record(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Returns what a checkpoint was made with, in plain numbers and texts."""
    return {
        "must_agree": _must_agree(trainer, pl_module),
        "processes": trainer.world_size,
        "parameter_groups": len(trainer.optimizers[0].param_groups),
        "accumulate": trainer.accumulate_grad_batches,
    }


def _must_agree(trainer: Trainer, pl_module: LightningModule) -> dict[str, list[str]]:
    """Returns the settings that a resumed run must share, by name: what to show, and what to compare."""
    data, module = stage_data(trainer), stage(pl_module)
    found = {name: [type(part).__qualname__] * 2 for name, part in (("model", module), ("data", data))}
    for setting in ("model.model_path", "model.reference_path", "model.reward_path"):
        path = getattr(module, setting.removeprefix("model."), None)
        found[setting] = [str(path), model_fingerprint(path, setting) if path else ""]
    tokenizer = module.tokenizer
    tokens = f"{len(tokenizer)} tokens, PAD {tokenizer.pad_token_id}, EOS {', '.join(map(str, eos_ids(tokenizer)))}"
    rows = data.splits["train"]
    some = files.fingerprint(repr(rows[n]) for n in sorted({0, len(rows) // 2, len(rows) - 1}))
    return found | {
        "the tokenizer of model.model_path": [tokens] * 2,
        "data.batch_size": [str(data.batch_size)] * 2,
        "data.train": [f"{len(rows)} rows", f"{len(rows)} {some}"],
        "seed_everything": [str(module.seed)] * 2,
    }


class Resume(Callback):
    """Resumes a run from a checkpoint, or refuses with the setting that prevents it.

    All other settings are those of this run, also the learning rate and other settings of the optimizer, which
    Lightning would take from the checkpoint.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._groups = 1
        self._given: list[dict[str, Any]] = []
        self._given_rates: list[list[float]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # before weights are loaded
        if stage != "fit":
            return
        state = read(self.path)
        found, done, limit = state.get(KEY), state.get("epoch", 0), trainer.max_epochs
        if limit is not None and -1 < limit < done:
            raise UserError(
                f"trainer.max_epochs is {limit}, but {self.path} has {done} epochs (PPO: updates) behind it; set it to "
                "more, or start another run with --run_dir."
            )
        if found is None:
            raise UserError(f"ckpt_path: {self.path} does not say what it was made with; it is not of this program.")
        own = _must_agree(trainer, pl_module)
        for name, (shown, compared) in found["must_agree"].items():
            now, compared_now = own.get(name, ["not set", ""])
            if compared_now != compared:
                change = f"{shown}, but now it is {now}" if shown != now else f"{shown}, which is no longer the same"
                raise UserError(
                    f"ckpt_path: the run of {self.path} cannot be resumed: {name} was {change}. Set it back, or "
                    f"{ANOTHER_RUN}"
                )
        self._compare_processes(trainer, found["processes"])
        self._groups = found.get("parameter_groups", 1)

    def _compare_processes(self, trainer: Trainer, before: int) -> None:
        now, zero = trainer.world_size, isinstance(trainer.strategy, DeepSpeedStrategy)
        check_parts(self.path, trainer.strategy)
        if zero and now != before:
            raise UserError(
                f"ckpt_path: {self.path} is of {before} processes, and each has a part of it; now there are {now} "
                "(trainer.devices x trainer.num_nodes). docs/resuming.md says how to resume from its weights."
            )
        parts = len(list(self.path.glob("checkpoint/*optim_states.pt")))
        if zero and parts < before:
            raise UserError(f"ckpt_path: {self.path} has the parts of {parts} processes out of {before}.")
        if now != before:
            rank_zero_info(
                f"The checkpoint is of {before} processes, now there are {now}: the run resumes with the same "
                "examples, but not to the last bit, and PPO draws other samples."
            )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("optimizer_states", [])  # one that was converted from ZeRO's has none
        before, now = checkpoint[KEY]["accumulate"], trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):  # in the micro-batches of this run
            missing, done = counts["ready"] - counts["completed"], counts["ready"] * now // before
            counts |= dict.fromkeys(counts, done) | {"completed": done - missing}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = trainer.optimizers[0].param_groups
        if len(groups) != self._groups:
            raise UserError(
                f"ckpt_path: the optimizer of {self.path} has {self._groups} groups of parameters, and now there are "
                f"{len(groups)}; {ANOTHER_RUN}"
            )
        self._given = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        schedules: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._given_rates = [list(schedule.base_lrs) for schedule in schedules]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The checkpoint has overwritten the settings; the learning rate stays where it is in its schedule.
        groups = trainer.optimizers[0].param_groups
        for group, given in zip(groups, self._given, strict=True):
            group |= given
        for config, given_rates in zip(trainer.lr_scheduler_configs, self._given_rates, strict=True):
            schedule: Any = config.scheduler
            rates = zip(groups, schedule.get_last_lr(), schedule.base_lrs, given_rates, strict=True)
            for group, rate, base, given_rate in rates:
                group["lr"] = rate if given_rate == base else rate * given_rate / base
            schedule.base_lrs = given_rates
