"""Files of a run: whenever writing stops, the old version or the new one is whole; fingerprints tell content apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf import files


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


def write(path: Path, kind: str, text: str) -> None:
    for file in [path] if kind == "file" else [path / "inner" / "a", path / "inner" / "b"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def content(path: Path) -> str:
    """What is at a path, or at the place of its old version."""
    found = path if path.exists() else files.previous_path(path)
    return found.read_text() if found.is_file() else "".join(f.read_text() for f in found.rglob("[ab]"))


def replace(path: Path, kind: str, error: Exception | None = None) -> None:
    with files.replacing(path) as partial:
        write(partial, kind, "new")
        if error:
            raise error


WHOLE = {"file": ("old", "new"), "folder": ("oldold", "newnew")}


@pytest.mark.parametrize(("old", "new"), [("file", "file"), ("folder", "folder"), ("folder", "file")])
def test_whenever_writing_stops_the_old_or_the_new_version_is_whole(tmp_path: Path, old: str, new: str) -> None:
    found = []
    for calls in range(12):
        path = tmp_path / str(calls) / "it"
        write(path, old, "old")
        with killed_after(calls):
            replace(path, new)
        found.append(content(path))
        replace(path, new)  # as a resumed run does
        assert content(path) == WHOLE[new][1]
        assert [p.name for p in path.parent.iterdir()] == ["it"]
    steps = found.index(WHOLE[new][1])
    assert steps == (1 if old == "file" else 2)
    assert found == [WHOLE[old][0]] * steps + [WHOLE[new][1]] * (12 - steps)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_the_old_version(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    write(path, kind, "old")
    with pytest.raises(OSError, match="full"):
        replace(path, kind, OSError("full"))
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert content(path) == WHOLE[kind][0]


def test_an_old_version_that_a_kill_left_aside_is_put_back_if_the_new_one_fails_again(tmp_path: Path) -> None:
    path = tmp_path / "it"
    write(path, "folder", "old")
    with killed_after(1):
        replace(path, "folder")
    assert not path.exists()
    with pytest.raises(OSError, match="full"):
        replace(path, "folder", OSError("full"))
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert content(path) == "oldold"


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("full")

    write(tmp_path / "it", "folder", "old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        replace(tmp_path / "it", "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert content(tmp_path / "it") == "oldold"


def test_fingerprints_tell_texts_and_bytes_apart(tmp_path: Path) -> None:
    assert files.fingerprint(["ab", "c"]) == files.fingerprint(["ab", "c"]) != files.fingerprint(["a", "bc"])
    file = tmp_path / "a"
    file.write_bytes(bytes(3_000_000))
    whole = files.sampled_fingerprint([file])
    for place in (0, 1_500_000, 2_999_999):
        changed = bytearray(3_000_000)
        changed[place] = 1
        file.write_bytes(changed)
        assert files.sampled_fingerprint([file]) != whole
