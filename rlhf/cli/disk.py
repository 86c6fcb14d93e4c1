"""The room on disks that the checkpoints and exports of a pipeline will take."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rlhf import files
from rlhf.callbacks.export import Export
from rlhf.callbacks.last_checkpoint import LastCheckpoint
from rlhf.hardware import GIB
from rlhf.models.memory import FLOAT32, trained_parameters
from rlhf.modules import StageModule
from rlhf.protocols import has_critic


class Disks:
    """Adds up what stages that follow one another write, and keep, per disk."""

    def __init__(self) -> None:
        self.kept: Counter[int] = Counter()  # bytes by the number of the disk
        self.most: dict[int, tuple[int, str, Path]] = {}  # likewise: the most bytes at a time, in which stage, where

    def add(self, name: str, run: Path, module: StageModule, trainer: Trainer) -> None:
        """Adds a stage that is still to run.

        A checkpoint holds each trained value with AdamW's two moments, and lies beside the one before it while it is
        written. An export holds each value, or those of the adapter, or both. All are in float32.
        """
        if files.is_complete(run / files.EXPORT):
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        trained, whole = (
            FLOAT32 * trained_parameters(module.model_config, module.kind, lora, has_critic(module))
            for lora in (module.lora, None)
        )
        size = trained if module.lora is None else 0
        if module.lora is not None:
            size += trained * (module.lora.export != "merged")
            size += whole * (module.lora.export != "adapter")
        checkpoint = 3 * trained if any(isinstance(c, LastCheckpoint) for c in callbacks) else 0
        every = next((c.every_n_epochs for c in callbacks if isinstance(c, Export)), 0)
        between = max(trainer.max_epochs or 0, 0) // every if every else 0
        there = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
        disk = files.existing(run).stat().st_dev
        between += any(isinstance(c, Export) and c.best is not None for c in callbacks)
        at_once = max(2 * checkpoint + between * size, checkpoint + (between + 1) * size)
        needed = self.kept[disk] + max(0, at_once - there)
        self.most[disk] = max(self.most.get(disk, (0, name, run)), (needed, name, run), key=lambda most: most[0])
        self.kept[disk] += max(0, checkpoint + (between + 1) * size - there)

    def complaints(self) -> Iterator[tuple[str, str]]:
        """Yields the stage in which a disk will be full, and a sentence."""
        for needed, name, run in self.most.values():
            free = shutil.disk_usage(files.existing(run)).free
            if needed > free:
                sizes = f"up to {needed / GIB:.1f} GiB, but the disk of {run} has {free / GIB:.1f} GiB left"
                advice = "free some, or choose a folder on another disk"
                yield name, f"run_dir: checkpoints and exports will take {sizes}; {advice}."
