"""LightningCLI for one stage: any module and DataModule by name, everything overridable, one folder per run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

import rlhf.data.preference
import rlhf.data.rollout
import rlhf.data.sft  # noqa: F401  (classes are found by name once they are imported)
from rlhf import run_folder
from rlhf.callbacks.export import Export
from rlhf.callbacks.predictions import PredictionFile
from rlhf.callbacks.progress import StageProgress
from rlhf.cli import parse
from rlhf.data.base import StageDataModule
from rlhf.modules import StageModule


class SaveConfig(SaveConfigCallback):
    """Saves the effective config of a training run as `<run folder>/config.yaml`."""

    def __init__(self, parser: LightningArgumentParser, config: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it; a resumed run writes it anew."""
        if stage == "fit":
            path = Path(trainer.default_root_dir) / run_folder.CONFIG
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)


class StageCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` of a stage."""

    @classmethod
    def run(cls, words: list[str]) -> StageCLI:
        """Parse the words of a command line and run them."""
        return cls(
            StageModule,
            StageDataModule,
            save_config_callback=SaveConfig,
            seed_everything_default=44413,
            trainer_defaults={"num_sanity_val_steps": 0, "max_epochs": 1, "enable_model_summary": False},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "train.py", "exit_on_error": False},
            args=words,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The folder of the run, which is the Trainer's root."""
        parser.add_argument("--run_dir", type=str, default="runs/run", help="folder of this run; never overwritten")
        parser.link_arguments("run_dir", "trainer.default_root_dir")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with errors as one sentence."""
        self.config = parse(parser, list(args or sys.argv[1:]))

    def _parse_ckpt_path(self) -> None:
        """Nothing in a checkpoint changes the settings: what the user typed wins."""

    def before_instantiate_classes(self) -> None:
        """Claim the run folder before anything expensive."""
        settings = self.config[self.config.subcommand]
        main_process = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
        if self.config.subcommand == "fit" and main_process and not settings.trainer.fast_dev_run:
            run_folder.claim(settings.run_dir, resuming=bool(settings.get("ckpt_path")))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        root = Path(config["default_root_dir"])
        if config["logger"] is None or config["logger"] is True:
            config["logger"] = TensorBoardLogger(root, name="", version=run_folder.CURVES, default_hp_metric=False)
        given = config["callbacks"] or []
        given = list(given) if isinstance(given, list) else [given]
        if config["enable_checkpointing"] is not False:
            checkpoint = ModelCheckpoint(root / run_folder.CHECKPOINTS, save_last=True, save_on_train_epoch_end=True)
            callbacks += _unless_given(given, checkpoint)
        if config["enable_progress_bar"] is not False:
            callbacks += _unless_given(given, StageProgress())
        callbacks += _unless_given(given, Export(), PredictionFile())
        return super()._instantiate_trainer(config, callbacks)


def _unless_given(given: list[Callback], *callbacks: Callback) -> list[Callback]:
    return [c for c in callbacks if not any(isinstance(g, type(c)) for g in given)]
