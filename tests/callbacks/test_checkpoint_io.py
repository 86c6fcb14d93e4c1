"""Checkpoints on disk are written whole or not at all; what is not complete is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from rlhf import files
from rlhf.callbacks.checkpoint_io import (
    AtomicCheckpointIO,
    _Writer,
    check_complete,
    find_last,
    read,
    read_weights,
)  # fmt: skip
from rlhf.callbacks.last_checkpoint import LastCheckpoint
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


def flip(file: Path, share: float) -> None:
    """Changes one bit of a file."""
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 16
    file.write_bytes(content)


def parts(path: Path, kind: str) -> list[Path]:
    """Writes a checkpoint, a file or a folder of ZeRO; returns its files."""
    names = [f"{name}_mp_rank_00_optim_states.pt" for name in ("zero_pp_rank_0", "zero_pp_rank_1")]
    files_of = [path] if kind == "file" else [path / "checkpoint" / n for n in ("mp_rank_00_model_states.pt", *names)]
    for file in files_of:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"a": torch.arange(1000.0), "b": 1}, file)
    return files_of


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_bit_in_any_part_is_found_whenever_a_checkpoint_is_loaded(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    for file in parts(path, kind):
        for share in (0.3, 0.5, 0.7):
            flip(file, share)
            for load in (check_complete, read, read_weights, AtomicCheckpointIO().load_checkpoint):
                with pytest.raises(UserError, match=f"{path} is no complete checkpoint: {file} is damaged"):
                    load(path)
            monkeypatch.setenv("LOCAL_RANK", "1")
            check_complete(path)  # the first process looks for all
            monkeypatch.delenv("LOCAL_RANK")
            flip(file, share)
            check_complete(path)


def test_a_checkpoint_is_read_through_once_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    test = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: looked.append(1) or test(self))
    parts(tmp_path / "last.ckpt", "file")
    for _ in range(3):
        check_complete(tmp_path / "last.ckpt")
    assert len(looked) == 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_checkpoint_before_stays_until_the_next_is_verified(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    class Module:
        device, kind = "cpu", "sft"

        def reduce_max(self, x: Any) -> Any:
            return x

    def save(trainer: Any, path: Path) -> None:
        """As Lightning and DeepSpeed do, on a disk that changes a bit."""
        if kind == "folder":
            writer = _Writer(SimpleNamespace(save=lambda state, file: flip(parts(path, kind)[1], 0.5)))
            writer.save({}, str(path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"))
            assert writer.error is not None
            raise writer.error  # as `save_together` does
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", lambda state, file: file.write(damaged))
            AtomicCheckpointIO().save_checkpoint({}, path)

    last = tmp_path / "checkpoints" / "last.ckpt"
    whole = [file.read_bytes() for file in parts(last, kind)]
    spoilt = parts(tmp_path / "spoilt", "file")[0]
    flip(spoilt, 0.5)
    damaged = spoilt.read_bytes()
    callback = LastCheckpoint()
    callback._path, callback._partial = last, files.partial_path(last)
    strategy = object.__new__(DeepSpeedStrategy) if kind == "folder" else None
    trainer: Any = SimpleNamespace(
        strategy=strategy, is_global_zero=True, loggers=[], fast_dev_run=False, global_step=2, current_epoch=0
    )
    monkeypatch.setattr("rlhf.callbacks.last_checkpoint.save_together", save)
    callback._save(trainer, Module(), "step")  # type: ignore[arg-type]
    assert "The checkpoint after step 2 could not be written: " in str(recwarn[-1].message)
    assert f"The one before it is intact: {last}" in str(recwarn[-1].message)
    assert [file.read_bytes() for file in sorted(last.rglob("*.pt")) or [last]] == whole
    assert [path.name for path in last.parent.iterdir()] == [last.name]


@pytest.mark.parametrize("given", ["checkpoints", ".", "export"])
def test_a_folder_beside_the_checkpoint_is_answered_with_its_path(tmp_path: Path, given: str) -> None:
    parts(tmp_path / "checkpoints" / "last.ckpt", "file")
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match=f"is a folder, but no checkpoint; give {tmp_path}/checkpoints/last.ckpt"):
        check_complete(tmp_path / given)
