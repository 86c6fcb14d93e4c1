"""The files of a run: where they lie, and how they are written so that neither a kill nor a full disk loses one."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from textwrap import shorten
from time import strftime
from typing import Any

from rlhf.errors import UserError

CONFIG, CHECKPOINTS, TENSORBOARD = "config.yaml", "checkpoints", "tensorboard"
CURVES, TOTAL = "curves.jsonl", "total/"  # <TOTAL><stage> is a curve with one point: how many steps there will be
SUMMARY = "summary.json"  # of a report: findings, summary and claims, as records
FINDINGS = "findings.json"  # name -> what a run says of itself that a user should know
EXPORT = "export"
MANIFEST = "rlhf.json"  # of an export: written last
WEIGHTS, CHECKSUMS = "*.safetensors", "checksums"  # files of an export whose sums are in its manifest, under a key
NOTES = ".json"  # the settings of <table> are in <table>.json
STATE, ENDED = "pipeline.json", "--ended"  # of a pipeline: what was run, and an entry once all of it was
TYPED = "RLHF_TYPED"  # variable of the environment: the command line of the pipeline that a stage belongs to
PARTS = ".parts"  # the finished rows of an unfinished <table> are in the folder <table>.parts
LOCK, OWNER = ".lock", ".owner.json"  # in a folder that one command at a time writes into: which one


def is_main_process() -> bool:
    """Tells whether this is the first process of the first node, by what Lightning, torchrun or SLURM set."""
    rank = next((os.environ[k] for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if k in os.environ), "0")
    return rank == os.environ.get("NODE_RANK", "0") == "0"


@contextmanager
def claimed(folder: Path, resuming: bool) -> Iterator[None]:
    """Makes this process the owner of the folder of a training run, a new one or one to resume, within the block.

    What an earlier try left that ended before its first checkpoint is moved aside, so that its curves do not mix with
    those of this run.

    Raises:
        UserError: another process owns the folder, it holds a run and this one is new, or an export but no checkpoint.
    """
    ours = (folder / OWNER).exists()  # a command of this program wrote there before
    with owned(folder):
        exports = [path.name for path in _exports(folder)]
        unfinished = resuming and not {EXPORT, previous_path(Path(EXPORT)).name} & {*exports}
        if not holds_run(folder) or (unfinished and (folder / CONFIG).exists() and not has_checkpoint(folder)):
            if (folder / CONFIG).exists():
                if not ours:
                    raise UserError(f"run_dir: {folder} has a {CONFIG} that is of no run; choose another folder.")
                left = set_aside(folder, (CONFIG, CURVES, FINDINGS, TENSORBOARD, CHECKPOINTS, *exports))
                print(f"{folder} has no checkpoint yet; what an earlier try left there is now in {left}.")
        elif not resuming:
            raise UserError(
                f"run_dir: {folder} already holds a run; choose another folder with --run_dir, or resume that run with "
                "--ckpt_path last."
            )
        elif not has_checkpoint(folder):
            raise UserError(
                f"run_dir: {folder} has no checkpoint to resume from, and {folder / exports[0]} would be replaced; "
                "choose another folder with --run_dir, or move it away."
            )
        yield


def holds_run(folder: Path) -> bool:
    """Tells whether a run folder has a checkpoint or an export: something that took time to make."""
    return bool(_exports(folder)) or has_checkpoint(folder)


def has_checkpoint(folder: Path) -> bool:
    """Tells whether there is a checkpoint in a run folder, of ours or of Lightning."""
    found = (path for depth in range(5) for path in folder.glob("*/" * depth + "*.ckpt"))  # Lightning's lie deep
    return any(not path.name.startswith((PARTIAL, TRASH)) for path in found)


def _exports(folder: Path) -> list[Path]:
    """Returns what lies where a run writes exports, whoever has put it there."""
    names = rf"({re.escape(PREVIOUS)})?{EXPORT}(_best|-\d+)?"
    return [path for path in folder.glob(f"*{EXPORT}*") if re.fullmatch(names, path.name)]


def existing(path: Path) -> Path:
    """Returns a path, or the folder above it that is there if it is not."""
    return next(found for found in (path, *path.absolute().parents) if found.exists())


def check_writable(folder: Path, setting: str) -> None:
    """Refuses a folder that cannot be written, or cannot be created; nothing is created."""
    found = existing(folder)
    if not found.is_dir():
        raise UserError(f"{setting}: the folder {folder} cannot be created: {found} is a file.")
    if not os.access(found, os.W_OK):
        problem = "cannot be written" if found == folder else f"cannot be created: {found} cannot be written"
        raise UserError(f"{setting}: the folder {folder} {problem}.")


def is_complete(export: Path) -> bool:
    """Tells whether an export was finished."""
    return (export / MANIFEST).is_file()


# --------------------------------------------------------------------------------------------------- one owner


_LOCKS: dict[Path, tuple[int, int]] = {}  # those of this process, with their device and inode
_BEFORE_WORK = {LOCK, OWNER, CONFIG, STATE}  # what a command writes before it does anything


@contextmanager
def owned(place: Path, setting: str = "run_dir", patience: float = 0, beside: bool = False) -> Iterator[None]:
    """Keeps other processes from owning a place within the block, by a lock that ends with this process at the latest.

    What killed processes have left half-written there is deleted. If the block fails before it has made anything,
    nothing is left of it, not even a folder.

    Args:
        place: a folder, which is created if it is not there; one process can own it several times.
        setting: how the user names it, for messages.
        patience: seconds to wait for another owner.
        beside: the place is a file, or a folder for others to read: the lock lies beside it, until the block ends.

    Raises:
        UserError: another process owns it, or it cannot be written.
    """
    from filelock import FileLock

    folder, prefix = (place.parent, f".{place.name}") if beside else (place, "")
    if not beside and place.resolve() in (Path.home(), Path(place.anchor or "/")):
        raise UserError(f"{setting}: {place} holds much else; choose a folder of its own.")
    check_writable(folder, setting)
    created = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}: the folder {folder} cannot be created: {error.strerror}.") from error
    before = set(os.listdir(folder))
    file, owner = folder.resolve() / f"{prefix}{LOCK}", folder / f"{prefix}{OWNER}"
    lock = FileLock(file, thread_local=False, is_singleton=True)
    _acquire(lock, place, owner, setting, patience)
    outermost, failed = file not in _LOCKS, True
    try:
        with suppress_os_errors():  # a full disk is no news here
            _LOCKS[file] = _identity(file)
            write_text(owner, json.dumps(_this_process()) + "\n")
        if outermost:
            _remove_partials(place, beside)
        yield
        failed = False
    finally:
        with suppress_os_errors():
            ours = {name for name in {*os.listdir(folder)} - before if not beside or name.startswith(place.name)}
            unused = failed and ours <= {*_BEFORE_WORK, f"{place.name}{NOTES}"}
            for name in {*(ours if unused else ()), *((file.name, owner.name) if beside else ())}:
                (folder / name).unlink()
        if outermost:
            _LOCKS.pop(file, None)
        lock.release()
        with suppress_os_errors():
            for path in created:
                path.rmdir()  # which fails unless it is empty


def _acquire(lock: Any, place: Path, owner: Path, setting: str, patience: float) -> None:
    from filelock import Timeout

    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not patience:
                raise
            print(f"{place} is in use by {_described(owner)}; waiting up to {patience:.0f} s for its end", flush=True)
            lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(
            f"{setting}: {place} is in use by {_described(owner)}; wait for its end, stop it, or choose another one "
            f"with --{setting}."
        ) from None
    except OSError as error:  # a file system without locks
        warnings.warn(f"{place} cannot be locked ({error}); make sure that nothing else writes into it.", stacklevel=4)


def taken_over(folder: Path) -> bool:
    """Tells whether a folder that this process owns was deleted, and is now that of another process."""
    file = folder.resolve() / LOCK
    return file in _LOCKS and file.exists() and _identity(file) != _LOCKS[file]


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino


def _this_process() -> dict[str, Any]:
    command = shorten(f"train.py {shlex.join(sys.argv[1:])}", 200)
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": strftime("%F %T"), "command": command}


def _described(owner: Path) -> str:
    """Describes the process that owns a place, by the file that it has written there."""
    try:
        return "process {pid} on {host}, since {since} ({command})".format(**json.loads(owner.read_text()))
    except (OSError, ValueError, KeyError):  # it is just about to write it
        return "another process"


def _remove_partials(place: Path, beside: bool) -> None:
    """Deletes what processes that no longer own a place have left half-written there."""
    if beside:
        found = [*place.parent.glob(f"{PARTIAL}????????-{place.name}*")]
    else:
        inner = (place, place / CHECKPOINTS)
        found = [path for mark in (PARTIAL, TRASH) for folder in inner for path in folder.glob(f"{mark}*")]
    with suppress_os_errors():
        for path in found:
            remove(path)


def set_aside(place: Path, only: Sequence[str] | None = None) -> Path:
    """Moves what is in a folder to the first free folder beside it, `sft.1`, or a table to `responses.1.parquet`.

    The folder itself stays, so that its owner owns it still; the notes and parts of a table move with it.

    Args:
        place: the folder or the table.
        only: names of what is moved; None: all.
    """
    place = place if place.name else place.resolve()
    stem, suffix = (place.name, "") if place.is_dir() else (place.stem, place.suffix)
    free = (place.with_name(f"{stem}.{number}{suffix}") for number in count(1))
    target = next(path for path in free if not any(path.parent.glob(f"{path.name}*")))
    if place.is_dir():
        target.mkdir()
        names = {path.name for path in place.iterdir()} - {LOCK, OWNER} if only is None else only
        moves = {place / name: target / name for name in names}
    else:
        moves = {place.with_name(place.name + end): target.with_name(target.name + end) for end in ("", NOTES, PARTS)}
    for old, new in moves.items():
        if old.exists():
            old.rename(new)
    return target


# ------------------------------------------------------------------------------------------- whole, or not at all

PARTIAL, PREVIOUS, TRASH = ".partial-", ".previous-", ".trash-"


def partial_path(path: Path) -> Path:
    """Returns where a file or folder lies while this process writes it."""
    return path.with_name(f"{PARTIAL}{fingerprint([socket.gethostname(), str(os.getpid())])[:8]}-{path.name}")


def previous_path(path: Path) -> Path:
    """Returns where the old version of a folder lies while the new one takes its place."""
    return path.with_name(f"{PREVIOUS}{path.name}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write a file or folder to, which replaces `path` when the block ends without an error.

    After an error or a kill, what was at `path` before is still there.
    """
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    _put_back(path)
    try:
        yield partial
        publish(partial, path)
    except BaseException:
        with suppress_os_errors():
            remove(partial)
            _put_back(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)


def publish(partial: Path, final: Path) -> None:
    """Moves a complete file or folder to its place.

    A file is replaced in one step. A folder cannot be, so the old one waits at `previous_path` until the new one is in
    its place: after a kill at any moment, one of the two is complete.
    """
    for path in [partial, *partial.rglob("*")]:
        sync(path)
    previous = previous_path(final)
    if final.is_dir() or (final.exists() and partial.is_dir()):
        remove(previous)
        final.rename(previous)
    partial.replace(final)
    sync(final.parent)
    remove(previous)


def _put_back(path: Path) -> None:
    previous = previous_path(path)
    if previous.exists() and not path.exists():
        previous.rename(path)


def remove(path: Path) -> None:
    """Deletes a file or folder, if there is one; a folder is renamed first, so that no half of it is ever seen."""
    trash = path.with_name(f"{TRASH}{path.name}")
    for target in (trash, path):
        if target.exists():
            if target is path:
                path.rename(trash)
            shutil.rmtree(trash) if trash.is_dir() else trash.unlink()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk. Some file systems cannot sync a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(number)


@contextmanager
def suppress_os_errors(seen: list[OSError] | None = None) -> Iterator[None]:
    """Ignores errors of the operating system inside the block, or collects them in `seen`."""
    try:
        yield
    except OSError as error:
        if seen is not None:
            seen.append(error)


# ------------------------------------------------------------------------------------------------- fingerprints

_SAMPLE = 1 << 20  # bytes read at the start, in the middle and at the end of a file


def fingerprint(texts: Iterable[str]) -> str:
    """Computes a fingerprint of texts in their order, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def checksums(folder: Path, pattern: str) -> dict[str, str]:
    """Computes the CRC-32 of files in a folder, by their path in it."""
    found = sorted(folder.rglob(pattern))
    return dict(zip((str(file.relative_to(folder)) for file in found), side_by_side(_checksum, found), strict=True))


def side_by_side(read: Callable[[Path], str], paths: Iterable[Path]) -> list[str]:
    """Applies a function to several files at a time."""
    with ThreadPoolExecutor() as pool:
        return [*pool.map(read, paths)]


def _checksum(file: Path) -> str:
    total = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_SAMPLE):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def sampled_fingerprint(files: Iterable[Path]) -> str:
    """Computes a fingerprint of files from their names, sizes and samples of their content."""
    return fingerprint(text for file in files for text in (file.name, _sampled(file)))


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
            stream.seek(start)
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
