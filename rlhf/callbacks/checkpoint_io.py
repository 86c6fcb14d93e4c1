"""Checkpoints on disk, files or (under ZeRO) folders: written whole or not at all, and checked before they are read."""

import zipfile
from collections.abc import Collection
from contextlib import nullcontext
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from typing_extensions import override

from rlhf import files
from rlhf.errors import UserError, causes
from rlhf.models.library_calls import explained
from rlhf.models.weights import first_not_finite
from rlhf.protocols import Stage
from rlhf.strategies import HARMLESS, safe_reading

LAST = "last.ckpt"


def find_last(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run."""
    last = folder / LAST
    return next((path for path in (last, files.previous_path(last)) if path.exists()), None)


def check_savable(trainer: Trainer, module: Stage) -> None:
    """Refuses to write weights that are not finite, or into a folder that is another run's by now. For all ranks.

    Raises:
        UserError: on all ranks.
    """
    folder = Path(trainer.default_root_dir)
    problem = ""
    if broken := first_not_finite(module.named_parameters()):
        last = find_last(folder / files.CHECKPOINTS)
        kept = f"the one before, {last}, stays: go on from it (--ckpt_path last)" if last else "start again"
        problem = (
            f"The weights are not finite after step {trainer.global_step}, so no checkpoint or export of them is "
            f"written ({broken}); {kept} with a lower model.optimization.learning_rate, or with "
            "trainer.gradient_clip_val."
        )
    elif trainer.is_global_zero and files.taken_over(folder):
        problem = f"run_dir: {folder} was deleted, and is another run's by now; this one ends without writing to it."
    if failed_anywhere(module, bool(problem)):
        raise UserError(problem or "Another process has stopped, see what it says.")


def failed_anywhere(module: Stage, failed: bool) -> bool:
    """Tells whether a step failed on any rank. All ranks must call it together."""
    return bool(module.reduce_max(torch.tensor(float(failed), device=module.device)) > 0)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and unlike Lightning's without a copy in memory or in /tmp."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        try:
            with files.replacing(Path(path)) as unfinished:
                with unfinished.open("wb") as file:
                    torch.save(checkpoint, file)
                verify(unfinished)
        except (OSError, RuntimeError) as error:
            raise _os_error(error) from error

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        check_complete(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def _os_error(error: BaseException) -> OSError:
    """Returns the error of the operating system that torch's writer turned into a `RuntimeError`."""
    found = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
    return found or OSError(str(error).splitlines()[0])


class _Writer:
    """Wraps DeepSpeed's writer, and keeps an error for later, when no other process waits."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.writer.save(state_dict, path)
            files.sync(Path(path))  # by the machine that wrote it, which also reads it again
            _raise_damage([Path(path)])
        except (OSError, RuntimeError) as error:
            self.error = _os_error(error)


def save_together(trainer: Trainer, path: Path) -> None:
    """Writes a checkpoint such that a process that fails does not leave the others waiting. Called on all ranks.

    Raises:
        OSError: this process could not write its part.
    """
    engine: Any = trainer.strategy.model if isinstance(trainer.strategy, DeepSpeedStrategy) else None
    writer = None
    if engine is not None:
        engine.checkpoint_engine = writer = _Writer(engine.checkpoint_engine)
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except OSError:  # on rank 0, which writes last; the others wait at Lightning's barrier, or at two of DeepSpeed
        for _ in range(1 if writer is None else 2):
            trainer.strategy.barrier()
        raise
    finally:
        if writer is not None:
            engine.checkpoint_engine = writer.writer
    if writer is not None and writer.error is not None:
        raise writer.error


def _states_file(path: Path) -> Path:
    return path / "checkpoint" / "mp_rank_00_model_states.pt" if path.is_dir() else path


def check_complete(path: Path) -> None:
    """Refuses a path that holds no checkpoint, only a part of one, or one in which a bit is not as it was written.

    Raises:
        UserError: a file is missing, cut off or damaged.
    """
    if path.is_dir() and not (path / "checkpoint").is_dir():
        near = (find_last(folder) for folder in (path, path / files.CHECKPOINTS, path.parent / files.CHECKPOINTS))
        meant = next(filter(None, near), f"<run_dir>/{files.CHECKPOINTS}/{LAST}")
        raise UserError(f"ckpt_path: {path} is a folder, but no checkpoint; give {meant}.")
    try:
        verify(path, contents=files.is_main_process())
    except OSError as error:
        raise UserError(
            f"ckpt_path: {path} is no complete checkpoint: {error}. Give another one, or train from the beginning in "
            "another folder (--run_dir)."
        ) from error


def verify(path: Path, contents: bool = True) -> None:
    """Reads a checkpoint and compares it with the checksums (CRC-32) that torch has written beside every tensor.

    Args:
        path: a file, or a folder of ZeRO.
        contents: False: only sees whether each file has its table of contents, which is at its end.

    Raises:
        OSError: a file is missing, cut off or damaged; the message names it.
    """
    _raise_damage({_states_file(path), *path.glob("checkpoint/*.pt")}, contents)


def _raise_damage(parts: Collection[Path], contents: bool = True) -> None:
    found = files.side_by_side(partial(_damage, contents=contents), parts)
    for part, problem in zip(parts, found, strict=True):
        if problem:
            raise OSError(f"{part} {problem}")


def _damage(file: Path, contents: bool) -> str:
    if not (file.is_file() and zipfile.is_zipfile(file)):
        return "is missing" if not file.exists() else "is cut off, or is no checkpoint"
    found = file.stat()
    return _damage_inside(file, found.st_mtime_ns, found.st_size) if contents else ""


@cache
def _damage_inside(file: Path, written: int, size: int) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as error:  # whatever a table of contents with a changed bit leads to
        bad = str(error)
    return f"is damaged: its contents are not those that were written ({bad})" if bad else ""


def check_contents(path: Path) -> None:
    """Refuses a checkpoint that is not one of a training run, or that holds more than numbers and texts.

    No weights are read.

    Raises:
        UserError: the same on all processes, unlike the errors of those that read the parts later.
    """
    check_complete(path)
    for file in path.glob("checkpoint/*.pt"):
        if unknown := {*torch.serialization.get_unsafe_globals_in_checkpoint(file)} - {*HARMLESS}:
            raise UserError(f"ckpt_path: {path} is not of this program: {file.name} would run {min(unknown)}.")
    state = read(path)
    weights = state.get("state_dict" if path.is_file() else "module")
    if not isinstance(weights, dict) or "pytorch-lightning_version" not in state:
        raise UserError(f"ckpt_path: {path} is no checkpoint of a training run.")


def check_parts(path: Path, strategy: Strategy) -> None:
    """Refuses a checkpoint of one file where ZeRO wants a folder of parts, and the other way round."""
    zero = isinstance(strategy, DeepSpeedStrategy)
    if path.is_dir() != zero:
        raise UserError(
            f"ckpt_path: {path} was written with{'out' * zero} ZeRO, and trainer.strategy is now one "
            f"with{'out' * (not zero)}; docs/resuming.md says how to resume from its weights."
        )


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without ZeRO's optimizer states; tensors are loaded when they are used.

    Raises:
        UserError: it cannot be read.
    """
    check_complete(path)
    if path.is_dir() and find_spec("deepspeed") is None:
        raise UserError(f"ckpt_path: {path} is of ZeRO and needs DeepSpeed, which is not installed here.")
    safe = nullcontext() if path.is_file() else safe_reading()
    with explained(f"ckpt_path: {path} is no checkpoint that can be read"), safe:
        state = torch.load(_states_file(path), map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict):
        raise UserError(f"ckpt_path: {path} is no checkpoint of a training run.")
    return state


def read_weights(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; its `state_dict` has the float32 weights, under ZeRO put together from all processes' parts.

    Raises:
        UserError: it cannot be read, or its files would run code.
    """
    check_contents(path)
    if path.is_file():
        return read(path)
    with safe_reading(), explained(f"ckpt_path: {path} is not complete"):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(str(path))
    return {**read(path), "state_dict": weights}
