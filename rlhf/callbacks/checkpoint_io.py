"""Checkpoints on disk, files or (of ZeRO) folders: written beside their place and moved there when complete."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from rlhf.errors import UserError

LAST = "last.ckpt"
PREVIOUS = "last-previous.ckpt"


def partial_path(path: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return path.with_name(f".partial-{path.name}")


def find_last(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = (folder / name for name in (LAST, PREVIOUS) if (folder / name).exists())
    return next(found, None)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one; what is half deleted has another name."""
    trash = path.with_name(f".trash-{path.name}")
    for target in (trash, path):
        if target.exists():
            if target is path:
                path.rename(trash)
            shutil.rmtree(trash) if trash.is_dir() else trash.unlink()


def publish(partial: Path, final: Path) -> None:
    """Move a complete checkpoint to its place.

    Whenever this stops, `find_last` finds a complete checkpoint: a file is replaced in one step; a folder can't be, so
    the old one waits under another name until the new one is there.
    """
    for path in [partial, *partial.rglob("*")]:
        _sync(path)
    previous = final.with_name(PREVIOUS)
    if final.is_dir() or (final.exists() and partial.is_dir()):
        remove(previous)
        final.rename(previous)
    partial.replace(final)
    _sync(final.parent)
    remove(previous)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk. Some file systems can't say it of a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(number)


def sync_folder(folder: str | None) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in Path(folder).glob("*") if folder else ():
        _sync(path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes one file, whole or not at all. Lightning's goes by way of memory and of the folder for temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint in the place of what is at `path`.

        Raises:
            OSError: it can't be written; what was at `path` is still there.
        """
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(final)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            publish(partial, final)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise write_error(error) from error


def write_error(error: BaseException) -> OSError:
    """The error of the operating system that torch's writer has made a `RuntimeError` of."""
    origin: BaseException | None = error
    while origin is not None and not isinstance(origin, OSError):
        origin = origin.__cause__ or origin.__context__
    return origin or OSError(str(error).splitlines()[0])


class _Writer:
    """DeepSpeed's writer, which keeps an error for later."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file."""
        try:
            self.writer.save(state_dict, path)
            _sync(Path(path))  # here, as another machine can't
        except (OSError, RuntimeError) as error:
            self.error = write_error(error)


def save_together(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint; a process that can't does not leave the others waiting. Called on all ranks.

    Raises:
        OSError: this process could not write its part.
    """
    engine: Any = trainer.strategy.model if isinstance(trainer.strategy, DeepSpeedStrategy) else None
    if engine is None:
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError:
            trainer.strategy.barrier()  # at which the others wait at the end of `save_checkpoint`
            raise
        return
    writer, kept = engine.checkpoint_engine, _Writer(engine.checkpoint_engine)
    engine.checkpoint_engine = kept
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except OSError:  # rank 0 writes some small files after all others
        trainer.strategy.barrier()
        trainer.strategy.barrier()
        raise
    finally:
        engine.checkpoint_engine = writer
    if kept.error is not None:
        raise kept.error


def check_complete(path: Path) -> None:
    """Refuse what is no checkpoint, or only a part of one: the table of contents is at the end of each file.

    Raises:
        UserError: it can't be resumed from.
    """
    files = [path] if path.is_file() else sorted(path.glob("checkpoint/*.pt"))
    states = path if path.is_file() else path / "checkpoint" / "mp_rank_00_model_states.pt"
    for file in files if states in files else [states]:
        if not (file.is_file() and zipfile.is_zipfile(file)):
            raise UserError(
                f"ckpt_path: {path} is no complete checkpoint, see {file}. Give another one, or train from the "
                "beginning in another folder (--run_dir)."
            )


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides the optimizer states of ZeRO; tensors are read when they are used.

    Raises:
        UserError: it can't be read.
    """
    check_complete(path)
    file = path if path.is_file() else path / "checkpoint" / "mp_rank_00_model_states.pt"
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=path.is_file())
    except Exception as error:
        raise UserError(f"ckpt_path: {path} is no checkpoint that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise UserError(f"ckpt_path: {path} is no checkpoint of a training run.")
    return state
