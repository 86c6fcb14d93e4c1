"""Checkpoints on disk: whenever writing stops, a complete one is found; what is not complete is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.callbacks.checkpoint_io import AtomicCheckpointIO, find_last, partial_path, publish, read, remove
from rlhf.cli.main import main
from rlhf.errors import UserError


class Kill(BaseException):
    """A kill that leaves the process of the tests alive."""


@contextmanager
def killed_after(calls: int) -> Iterator[None]:
    """Within, after so many changes of the folder the process is killed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir"):

            def change(*args: Any, original: Callable[..., Any] = getattr(os, name), **kwargs: Any) -> Any:
                nonlocal calls
                calls -= 1
                if calls < 0:
                    raise Kill
                return original(*args, **kwargs)

            patch.setattr(os, name, change)
        with suppress(Kill):
            yield


@pytest.mark.parametrize(("old", "new"), [("file", "file"), ("folder", "folder"), ("folder", "file")])
def test_whenever_writing_stops_a_complete_checkpoint_is_found(tmp_path: Path, old: str, new: str) -> None:
    def write(path: Path, kind: str, text: str) -> None:
        files = [path] if kind == "file" else [path / "checkpoint" / "a", path / "checkpoint" / "b"]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def content(path: Path) -> str:
        return path.read_text() if path.is_file() else "".join(f.read_text() for f in path.rglob("[ab]"))

    def publish_last(folder: Path, kind: str, text: str) -> None:
        partial = partial_path(folder / "last.ckpt")
        write(partial, kind, text)
        publish(partial, folder / "last.ckpt")

    whole = {"file": ("old", "new"), "folder": ("oldold", "newnew")}
    found = []
    for calls in range(12):
        folder = tmp_path / str(calls)
        write(folder / "last.ckpt", old, "old")
        with killed_after(calls):
            publish_last(folder, new, "new")
        last = find_last(folder)
        assert last is not None
        found.append(content(last))
        remove(partial_path(folder / "last.ckpt"))
        publish_last(folder, new, "new")  # as a run does that goes on
        assert content(folder / "last.ckpt") == whole[new][1]
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    steps = found.index(whole[new][1])
    assert steps == (1 if old == "file" else 2)
    assert found == [whole[old][0]] * steps + [whole[new][1]] * (12 - steps)


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
