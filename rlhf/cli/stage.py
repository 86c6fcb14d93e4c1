"""LightningCLI for one stage: any module and DataModule by name, everything overridable, one folder per run."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse.typing import restricted_number_type
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

import rlhf
from rlhf import files, heartbeat
from rlhf.callbacks import unless_given
from rlhf.callbacks.checkpoint_io import check_contents, check_parts, find_last
from rlhf.callbacks.export import Export
from rlhf.callbacks.invariants import Invariants
from rlhf.callbacks.last_checkpoint import LastCheckpoint
from rlhf.callbacks.prediction_file import PREDICTIONS, PredictionFile
from rlhf.callbacks.progress_bar import StageProgress
from rlhf.callbacks.resume import Resume
from rlhf.cli.check import StageTrainer
from rlhf.cli.parsing import add_trust, parse, take_trust
from rlhf.cli.values import check_stage
from rlhf.data.stage_data import StageDataModule
from rlhf.errors import UserError, causes, find_user_error
from rlhf.modules import StageModule
from rlhf.seeding import DEFAULT_SEED
from rlhf.strategies import check_strategy, watch
from rlhf.studies.processes import end_with_parent

FOUND_BY_NAME = [
    getattr(rlhf, name) for name in rlhf.__all__ if name[0].isupper()
]  # jsonargparse finds what is imported
WRITERS = (Export, PredictionFile, Checkpoint, LastCheckpoint)
ONE_UPDATE: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "min_epochs": None,
    "min_steps": None,
    "num_sanity_val_steps": 1,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 10**9,
}


class SaveConfig(SaveConfigCallback):
    """Saves the effective config of a training run as `<run folder>/config.yaml`."""

    def __init__(self, parser: LightningArgumentParser, config: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            text = self.parser.dump(self.config, skip_none=False)
            files.write_text(Path(trainer.default_root_dir) / files.CONFIG, text)


class StageCLI(LightningCLI):
    """Runs `fit`, `check`, `validate`, `test` and `predict` of a stage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.verb: str = kwargs["args"][0]
        with ExitStack() as self.owned:  # the run folder
            try:
                super().__init__(*args, **kwargs)  # runs it all
            except SystemExit as error:
                if not isinstance(error.__context__, KeyboardInterrupt):
                    raise
                self._end_interrupted()

    def _end_interrupted(self) -> NoReturn:
        """Ends after a Ctrl-C that Lightning has taken for itself."""
        if self.subcommand != "fit":
            raise KeyboardInterrupt
        if files.is_main_process():
            last = find_last(Path(self.trainer.default_root_dir) / files.CHECKPOINTS)
            found = f"Resume from {last} with --ckpt_path last." if last else "There is no checkpoint yet."
            print(f"\nStopped by SIGINT. {found}", file=sys.stderr)
        raise SystemExit(130)

    @classmethod
    def run(cls, words: list[str]) -> StageCLI:
        """Parses a command line and runs it."""
        return cls(
            StageModule,
            StageDataModule,
            save_config_callback=SaveConfig,
            trainer_class=StageTrainer,
            seed_everything_default=DEFAULT_SEED,
            trainer_defaults={"num_sanity_val_steps": 0, "max_epochs": 1, "enable_model_summary": False},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "train.py",
                "exit_on_error": False,
                "allow_abbrev": False,
                **{verb: {"allow_abbrev": False} for verb in cls.subcommands()},
            },
            args=words,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "check": {"model", "datamodule"}}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leaves the parsers of the other subcommands empty, which saves two fifths of the time of parsing."""
        if subcommand == self.verb:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/run", help="folder of this run; never overwritten")
        add_trust(parser)
        silence = "minutes that one of several processes may be silent, or all be stuck, before all are ended"
        week = restricted_number_type("Minutes", float, [(">", 0), ("<=", 7 * 24 * 60)])
        parser.add_argument("--silence", type=week, default=heartbeat.MINUTES, help=silence)
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "trainer.logger.init_args.save_dir")  # of each, if there are several

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        words = list(args or sys.argv[1:])
        self.config = parse(parser, words, self._parser(words[0]))
        check_stage(self.config[self.config.subcommand], self.config.subcommand in ("fit", "check"))
        take_trust(self.config[self.config.subcommand])

    @override
    def _parse_ckpt_path(self) -> None:
        """Does nothing: settings in a checkpoint do not override what the user typed."""

    @override
    def before_instantiate_classes(self) -> None:  # claims the run folder before anything expensive
        settings = self.config[self.config.subcommand]
        if self.config.subcommand == "check":
            self.save_config_callback = None
            return
        limits = {name: settings.trainer[name] for name in ("max_epochs", "max_steps")}
        if self.config.subcommand == "fit" and 0 in limits.values() and not settings.trainer.fast_dev_run:
            name = next(name for name, limit in limits.items() if limit == 0)
            raise UserError(f"trainer.{name} is 0: nothing would be trained; set it to 1 or more.")
        run = Path(settings.run_dir)
        if not files.is_main_process() or settings.trainer.fast_dev_run:
            pass
        elif self.config.subcommand == "fit":
            self.owned.enter_context(files.claimed(run, settings.get("ckpt_path") is not None))
        elif self.config.subcommand == "predict":
            self.owned.enter_context(files.owned(run / PREDICTIONS, beside=True))
        else:
            files.check_writable(run, "run_dir")
        self._find_checkpoint(settings)
        if self.config.subcommand == "fit" and os.environ.get("LOCAL_RANK", "0") != "0":
            end_with_parent()

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if Logger.__name__ not in str(error) or find_user_error(error):
                raise
            reason = " ".join(str([*causes(error)][-1]).split())  # of a library that is missing, or refuses
            raise UserError(f"trainer.logger: {reason}") from error
        self.model.check_data(self.datamodule)  # before it is read
        if self.subcommand == "fit":
            self.model.check_schedule(self.trainer)

    def _find_checkpoint(self, settings: Any) -> None:
        """Replaces `last` by the path of the last checkpoint; refuses one that is missing or incomplete."""
        if settings.get("ckpt_path") == "last":
            folder = Path(settings.run_dir) / files.CHECKPOINTS
            last = find_last(folder)
            if last is None and self.config.subcommand != "fit":
                raise UserError(f"ckpt_path: there is no checkpoint in {folder}.")
            if last is None:
                rank_zero_info(f"There is no checkpoint in {folder} yet: the run starts from the beginning.")
            settings.ckpt_path = last and str(last)
        checkpoint = settings.get("ckpt_path")
        if checkpoint in ("", "best"):  # Lightning knows the best one only of a run of the same process
            raise UserError(f"ckpt_path: {checkpoint!r} is no checkpoint; give the path of a checkpoint, or last.")
        if checkpoint is not None:
            if not Path(checkpoint).exists():
                raise UserError(f"ckpt_path: there is no checkpoint {checkpoint}.")
            check_contents(Path(checkpoint))

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config["callbacks"] or []
        given = list(given) if isinstance(given, list) else [given]
        fitting = self.subcommand == "fit"
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if self.subcommand == "check":  # nothing is written
            config |= ONE_UPDATE | {"logger": DummyLogger()}
            given = [c for c in given if not isinstance(c, WRITERS)]
        else:
            if not fitting:
                config["logger"] = config["logger"] or False  # the curves of a run are those of its training
            elif config["logger"] in (None, True):
                root = config["default_root_dir"]
                config["logger"] = TensorBoardLogger(root, name="", version=files.TENSORBOARD, default_hp_metric=False)
            if fitting and checkpoint is not None:
                given.append(Resume(checkpoint))
            if config["enable_checkpointing"] is not False:
                given += unless_given(given, LastCheckpoint())
                config["enable_checkpointing"] = any(isinstance(c, Checkpoint) for c in given)
            if config["enable_progress_bar"] is not False:
                callbacks += unless_given(given, StageProgress())
            callbacks += unless_given(given, Export(), PredictionFile())
            callbacks += [c for c in given if isinstance(c, Invariants)]  # they look at what was exported
            given = [c for c in given if not isinstance(c, Invariants)]
        try:
            trainer = super()._instantiate_trainer({**config, "callbacks": given}, callbacks)
        except (ValueError, TypeError, OverflowError, MisconfigurationException) as error:  # a setting does not fit
            raise UserError(f"trainer: {error}") from error
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        if any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers):
            raise UserError("trainer.max_time leaves no time to train: it should be more than 0.")
        check_strategy(trainer)  # before any data is tokenised
        if checkpoint is not None:
            check_parts(Path(checkpoint), trainer.strategy)
        watch(trainer, self.config[self.subcommand].silence)
        return trainer
