"""What a checkpoint was made with: a run that cannot resume from it is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from rlhf.callbacks.resume import Resume, record
from rlhf.errors import UserError


@pytest.fixture
def stage(model_path: str, tokenizer: Any) -> Any:
    """As much of a Trainer and a module as a checkpoint names."""
    rows = [{"input_ids": [n]} for n in range(9)]
    data = SimpleNamespace(batch_size=8, splits={"train": rows})
    optimizer = SimpleNamespace(param_groups=[{"params": []}])
    how = {"strategy": None, "world_size": 2, "accumulate_grad_batches": 1, "max_epochs": 9}
    trainer = SimpleNamespace(datamodule=data, optimizers=[optimizer], lr_scheduler_configs=[], **how)
    module = SimpleNamespace(model_path=model_path, reference_path=None, tokenizer=tokenizer, seed=1)
    return SimpleNamespace(trainer=trainer, module=module, data=data)


class EmptyTokenizer:
    """Has one token."""

    pad_token_id = eos_token_id = 0

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("model.model_path was", lambda s, p: setattr(s.module, "model_path", p)),
        ("model.reward_path was None, but now it is", lambda s, p: setattr(s.module, "reward_path", p)),
        ("model.reference_path was", lambda s, p: setattr(s.module, "reference_path", p)),
        ("the tokenizer of model.model_path was", lambda s, p: setattr(s.module, "tokenizer", EmptyTokenizer())),
        ("data.batch_size was 8, but now it is 16", lambda s, p: setattr(s.data, "batch_size", 16)),
        ("data.train was 9 rows, but now it is 8 rows", lambda s, p: s.data.splits["train"].pop()),
        ("data.train was 9 rows, which is no longer", lambda s, p: s.data.splits["train"].reverse()),
        ("seed_everything was 1, but now it is 2", lambda s, p: setattr(s.module, "seed", 2)),
    ],
)
def test_a_run_that_cannot_be_resumed_is_refused_by_name(
    stage: Any, tmp_path: Path, reward_path: str, setting: str, change: Callable[[Any, str], None]
) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"rlhf": record(stage.trainer, stage.module)}, path)
    Resume(path).setup(stage.trainer, stage.module, "fit")
    change(stage, reward_path)
    Resume(path).setup(stage.trainer, stage.module, "validate")
    with pytest.raises(UserError, match=rf"ckpt_path: the run of {path} cannot be resumed: .*{setting}.*--run_dir"):
        Resume(path).setup(stage.trainer, stage.module, "fit")


@pytest.mark.parametrize(
    ("parts", "processes", "zero", "message"),
    [
        (1, 2, True, "has the parts of 1 processes out of 2"),
        (2, 3, True, "is of 2 processes, and each has a part of it; now there are 3"),
        (2, 2, False, "written with ZeRO, and trainer.strategy is now one without"),
        (0, 2, True, "written without ZeRO, and trainer.strategy is now one with;"),
    ],
)
def test_zero_needs_its_own_parts(
    stage: Any, tmp_path: Path, parts: int, processes: int, zero: bool, message: str
) -> None:
    path = tmp_path / "last.ckpt"
    files = [path]
    if parts:
        (path / "checkpoint").mkdir(parents=True)
        names = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in range(parts))]
        files = [path / "checkpoint" / name for name in names]
    for file in files:
        torch.save({"rlhf": record(stage.trainer, stage.module)}, file)
    stage.trainer.strategy = object.__new__(DeepSpeedStrategy) if zero else None
    stage.trainer.world_size = processes
    with pytest.raises(UserError, match=message):
        Resume(path).setup(stage.trainer, stage.module, "fit")


def test_a_checkpoint_of_another_program_is_refused(stage: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="does not say what it was made with"):
        Resume(tmp_path / "a.ckpt").setup(stage.trainer, stage.module, "fit")


def test_an_optimizer_of_other_groups_is_refused(stage: Any, tmp_path: Path) -> None:
    path, groups = tmp_path / "last.ckpt", stage.trainer.optimizers[0].param_groups
    known = record(stage.trainer, stage.module)
    earlier = {name: value for name, value in known.items() if name != "parameter_groups"}
    for written in (known, earlier):
        torch.save({"rlhf": written}, path)
        resume = Resume(path)
        resume.setup(stage.trainer, stage.module, "fit")
        resume.on_fit_start(stage.trainer, stage.module)
    groups.append({"params": []})
    with pytest.raises(UserError, match=rf"the optimizer of {path} has 1 groups .* now there are 2; .*--run_dir"):
        resume.on_fit_start(stage.trainer, stage.module)


def test_a_model_is_known_by_its_weights_wherever_it_lies(stage: Any, tmp_path: Path) -> None:
    path, copy = tmp_path / "last.ckpt", tmp_path / "copy"
    torch.save({"rlhf": record(stage.trainer, stage.module)}, path)
    shutil.copytree(stage.module.model_path, copy)
    stage.module.model_path = str(copy)
    Resume(path).setup(stage.trainer, stage.module, "fit")
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model.model_path was"):
        Resume(path).setup(stage.trainer, stage.module, "fit")
