"""Files of a run: whenever writing stops, the old version or the new one is whole; fingerprints tell content apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf import files
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


def test_all_of_it_is_on_the_disk_before_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[tuple[int, int]] = set()
    moved: list[bool] = []
    sync, move = os.fsync, os.replace

    def identity(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def fsync(number: int) -> None:
        synced.add(identity(os.fstat(number)))
        sync(number)

    def replace_synced(partial: Any, final: Any) -> None:
        parts = [Path(partial), *Path(partial).rglob("*")]
        moved.append(all(identity(part.stat()) in synced for part in parts))
        move(partial, final)
        synced.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_synced)
    for kind in WHOLE:
        replace(tmp_path / kind, kind)
        assert identity(tmp_path.stat()) in synced  # that it was moved
    assert moved == [True, True]


def test_two_processes_that_write_the_same_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.replacing(tmp_path / "it") as partial:
        partial.write_text("first, ")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            files.write_text(tmp_path / "it", "of another process")
        assert content(tmp_path / "it") == "of another process"
        with partial.open("a") as file:
            file.write("second")
    assert content(tmp_path / "it") == "first, second"


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


# ------------------------------------------------------------------------------------------- one owner, and aside

HOLD = """import sys, time
from pathlib import Path
from rlhf import files
with files.owned(Path(sys.argv[1]), beside=sys.argv[3] == "True"):
    print(flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def another_owner(place: Path, seconds: float, beside: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Within, another process has owned a place, for so long."""
    command = [sys.executable, "-c", HOLD, str(place), str(seconds), str(beside)]
    with subprocess.Popen(command, stdout=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_folder_has_one_owner_and_is_free_when_that_is_killed(tmp_path: Path) -> None:
    with another_owner(tmp_path, 60) as owner:
        with pytest.raises(UserError) as refused, files.owned(tmp_path, "output"):
            pass
        assert str(refused.value).startswith(f"output: {tmp_path} is in use by process {owner.pid} on ")
        assert f"(train.py {tmp_path} 60 False)" in str(refused.value)
        owner.kill()
        owner.wait()
        with files.owned(tmp_path), files.owned(tmp_path):  # one command, in several places
            pass


def test_a_file_has_one_owner_too_who_leaves_nothing_beside_it(tmp_path: Path) -> None:
    table = tmp_path / "new" / "table.csv"
    left = [tmp_path / "new" / f".partial-0123abcd-{name}" for name in ("table.csv", "table.csv.json", "a-table.csv")]
    with another_owner(table, 60, beside=True) as owner:
        refused = pytest.raises(UserError, match=f"output: {table} is in use by process {owner.pid} on ")
        with refused, files.owned(table, "output", beside=True):
            pass
        with files.owned(table.with_name("other.csv"), "output", beside=True):
            pass
        owner.kill()
        owner.wait()
    for file in left:
        file.touch()
    with files.owned(table, "output", beside=True):
        assert [file.exists() for file in left] == [False, False, True]
        table.touch()
    left[2].unlink()
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_what_a_killed_owner_was_writing_is_deleted(tmp_path: Path) -> None:
    left = [tmp_path / ".partial-0123abcd-export" / "a", tmp_path / files.CHECKPOINTS / ".trash-last.ckpt" / "a"]
    kept = [tmp_path / files.CHECKPOINTS / ".previous-last.ckpt" / "a", tmp_path / "a"]
    for file in (*left, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with files.owned(tmp_path):
        partial = files.partial_path(tmp_path / "a")
        partial.touch()
        with files.owned(tmp_path):
            assert partial.exists()
    assert [file.parent.exists() for file in (*left, *kept)] == [False, False, True, True]


def refuse(place: Path, beside: bool, *names: str) -> None:
    """A command that writes some files, and then fails."""
    with suppress(UserError), files.owned(place, beside=beside):
        for name in names:
            (place.parent if beside else place).joinpath(name).touch()
        raise UserError("wrong")


@pytest.mark.parametrize("there", ["nothing", "folder", "file"])
def test_a_command_that_is_refused_leaves_nothing(there: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "deep"
    if there != "nothing":
        folder.mkdir(parents=True)
    if there == "file":
        (folder / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    for beside in (False, True):
        place = folder / "t.csv" if beside else folder
        refuse(place, beside, "t.csv.json" if beside else files.CONFIG)
        assert sorted(tmp_path.rglob("*")) == before
    refuse(folder, False, files.CONFIG, files.CURVES)
    assert {path.name for path in folder.iterdir()} >= {files.CONFIG, files.CURVES, files.LOCK}


def test_a_folder_that_was_deleted_and_is_anothers_now_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with files.owned(folder):
        assert not files.taken_over(folder)
        shutil.rmtree(folder)
        assert not files.taken_over(folder)  # it can be written again
        with another_owner(folder, 60):
            assert files.taken_over(folder)
    assert not files.taken_over(folder)


def test_a_folder_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another_owner(tmp_path, 0.5) as owner, files.owned(tmp_path, patience=60):
        assert owner.wait() == 0
    assert f"in use by process {owner.pid}" in capsys.readouterr().out


def test_a_file_system_without_locks_gets_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available"), files.owned(tmp_path):
        pass


def test_what_is_set_aside_gets_the_first_free_name(tmp_path: Path) -> None:
    folder = tmp_path / "pythia-1.4b"
    folder.mkdir()
    with files.owned(folder):
        for number in (1, 2):
            write(folder, "folder", str(number))
            aside = files.set_aside(folder)
            assert (aside.name, content(aside)) == (f"pythia-1.4b.{number}", 2 * str(number))
            assert {path.name for path in folder.iterdir()} == {files.LOCK, files.OWNER}
    table = tmp_path / "judged.parquet"
    for ending in ("", ".json", ".parts", ".answers.jsonl"):
        table.with_name(table.name + ending).touch()
    assert files.set_aside(table) == tmp_path / "judged.1.parquet"
    names = [".answers.jsonl", ".json", ".parts", ""]  # answers are paid for, and stay
    found = sorted(path.name for path in tmp_path.glob("judged*"))
    assert found == sorted(f"judged{'' if end == names[0] else '.1'}.parquet{end}" for end in names)


@pytest.mark.parametrize(
    ("file", "holds"),
    [
        ("config.yaml", False),
        ("tensorboard/events", False),
        ("checkpoints/.partial-last.ckpt", False),
        (".partial-export/rlhf.json", False),
        ("checkpoints/last.ckpt", True),
        ("checkpoints/.previous-last.ckpt", True),
        ("checkpoints/last.ckpt/checkpoint/part.pt", True),
        ("tensorboard/checkpoints/epoch=1.ckpt", True),
        ("export/rlhf.json", True),
        ("export/model.safetensors", True),
        ("exported/rlhf.json", False),
        ("export-8/rlhf.json", True),
        (".previous-export/rlhf.json", True),
    ],
)
def test_a_run_is_what_has_a_checkpoint_or_an_export(file: str, holds: bool, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert files.holds_run(tmp_path) == holds


@pytest.mark.parametrize("name", ["export", "export_best", ".previous-export"])
def test_an_export_without_a_checkpoint_is_kept_from_a_run_that_would_resume(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").touch()
    for resuming, words in (
        (True, f"no checkpoint to resume from, and .*{name} would"),
        (False, "already holds a run"),
    ):
        with pytest.raises(UserError, match=words), files.claimed(tmp_path, resuming):
            pass
    (tmp_path / files.CHECKPOINTS).mkdir()
    (tmp_path / files.CHECKPOINTS / "last.ckpt").touch()
    with files.claimed(tmp_path, True):
        pass


def test_exports_during_a_run_without_a_checkpoint_are_moved_aside_when_it_starts_again(tmp_path: Path) -> None:
    """As where the best export is kept, and a kill comes before the first checkpoint."""
    folder = tmp_path / "run"
    with files.claimed(folder, False):
        (folder / files.CONFIG).touch()
        for name in ("export_best", "export-3"):
            write(folder / name, "folder", "old")
    with pytest.raises(UserError, match="already holds a run"), files.claimed(folder, False):
        pass
    with files.claimed(folder, True):
        assert {path.name for path in folder.iterdir()} == {files.LOCK, files.OWNER}
    assert [content(tmp_path / "run.1" / name) for name in ("export_best", "export-3")] == ["oldold", "oldold"]


def test_files_of_the_users_own_are_never_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in (files.CONFIG, "sft.jsonl"):
        (folder / name).write_text("mine")
    for _ in range(2):  # the first time leaves nothing that would make it look like a run
        with pytest.raises(UserError, match=r"has a config.yaml that is of no run"), files.claimed(folder, False):
            pass
    (folder / files.CONFIG).unlink()
    with files.claimed(folder, False):  # a run that writes its config, and fails
        (folder / files.CONFIG).write_text("of the run")
    with files.claimed(folder, False):
        assert not (folder / files.CONFIG).exists()
    assert (folder / "sft.jsonl").read_text() == "mine"
    assert f"is now in {folder}.1" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "project.1").iterdir()] == [files.CONFIG]


def test_the_folder_of_this_process_can_be_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        with files.claimed(Path(), False):
            Path(files.CONFIG).write_text("of the run")
    assert (tmp_path / "here.1" / files.CONFIG).is_file()


@pytest.mark.parametrize("place", [Path("/"), Path.home()])
def test_a_folder_of_much_else_is_not_owned(place: Path) -> None:
    with pytest.raises(UserError, match="holds much else"), files.owned(place):
        pass


def test_a_checkpoint_of_lightning_is_seen(tmp_path: Path) -> None:
    place = tmp_path / "tensorboard" / "version_0" / "checkpoints"
    place.mkdir(parents=True)
    assert not files.holds_run(tmp_path)
    (place / "epoch=1-step=4.ckpt").touch()
    assert files.holds_run(tmp_path)
