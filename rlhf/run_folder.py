"""The folder of a run: where everything lies, and the rule that no run is ever overwritten."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.errors import UserError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
CURVES = "tensorboard"
NOTES = ".json"  # of a table: its settings are in <table>.json,
PARTS = ".parts"  # and what is done of it, until it is finished, in the folder <table>.parts


def is_main_process() -> bool:
    """Whether this is the first process of the first node, by what Lightning, torchrun or SLURM set before a start."""
    rank = next((os.environ[k] for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if k in os.environ), "0")
    return rank == os.environ.get("NODE_RANK", "0") == "0"


def claim(run_dir: str, resuming: bool, setting: str = "run_dir") -> Path:
    """Make the folder of a new run, or find that of a run that goes on.

    Args:
        run_dir: the folder.
        resuming: it may hold a run.
        setting: how the user names it, for messages.

    Raises:
        UserError: it can't be written, or it holds another run.
    """
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}: the folder {folder} can't be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{setting}: the folder {folder} can't be written.")
    if (folder / CONFIG).exists() and not resuming:
        raise UserError(
            f"{setting}: {folder} already holds a run; choose another folder with --{setting}, or go on with that run "
            "with --ckpt_path last."
        )
    return folder
