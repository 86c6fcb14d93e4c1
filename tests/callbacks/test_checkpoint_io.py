"""Checkpoints on disk are written whole or not at all; what is not complete is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import files
from rlhf.callbacks.checkpoint_io import AtomicCheckpointIO, find_last, read
from rlhf.cli.main import main
from rlhf.errors import UserError


def test_the_old_version_is_found_while_a_new_one_takes_its_place(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    assert find_last(tmp_path) is None
    files.partial_path(last).mkdir()
    assert find_last(tmp_path) is None
    files.previous_path(last).mkdir()
    assert find_last(tmp_path) == files.previous_path(last)
    last.mkdir()
    assert find_last(tmp_path) == last


class Kill(BaseException):
    """A kill that leaves the process of the tests alive."""


def test_other_checkpoints_are_whole_too(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)

    class Broken:
        def __reduce__(self) -> Any:
            raise Kill

    with pytest.raises(Kill):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100), "b": Broken()}, path)
    assert torch.load(path) == {"a": 1}


@pytest.mark.parametrize("content", ["cut", "text", "folder", "zip"])
def test_what_is_no_whole_checkpoint_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1000)}, path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif content == "text":
        path.write_text("not a checkpoint")
    elif content == "zip":
        torch.save([1], path)
    else:
        whole = path.read_bytes()
        path.unlink()
        (path / "checkpoint").mkdir(parents=True)
        (path / "checkpoint" / "mp_rank_00_model_states.pt").write_bytes(whole)
        (path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(whole[:-500])
    with pytest.raises(UserError, match=f"ckpt_path: {path} is no"):
        read(path)
    if content == "cut":
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--model=SFTModule", "--data=SFTDataModule", "--model.model_path=x", "--data.train.path=x",
                  f"--run_dir={tmp_path}/run", f"--ckpt_path={path}"])  # fmt: skip
        assert stop.value.code == 2
        assert f"{path} is no complete checkpoint" in capsys.readouterr().err
