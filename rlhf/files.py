"""The files of a run: where they lie, and how they are written so that neither a kill nor a full disk loses one."""

import errno
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from textwrap import shorten
from time import strftime

from rlhf.errors import UserError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
CURVES = "curves.jsonl"
TENSORBOARD = "tensorboard"
SUMMARY = "summary.json"  # of a report: findings, summary and claims, as records
FINDINGS = "findings.json"  # name -> what a run says of itself that a user should know
EXPORT = "export"
MANIFEST = "rlhf.json"  # of an export: written last
NOTES = ".json"  # the settings of <table> are in <table>.json
PARTS = ".parts"  # the finished rows of an unfinished <table> are in the folder <table>.parts
LOCK, OWNER = ".lock", ".owner.json"  # in a folder that one command at a time writes into: which one


def is_main_process() -> bool:
    """Tells whether this is the first process of the first node, by what Lightning, torchrun or SLURM set."""
    rank = next((os.environ[k] for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if k in os.environ), "0")
    return rank == os.environ.get("NODE_RANK", "0") == "0"


def create_folder(path: str, setting: str = "run_dir") -> Path:
    """Creates a folder to write into, or finds it.

    Args:
        path: the folder.
        setting: how the user names it, for messages.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(path)
    check_writable(folder, setting)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}: the folder {folder} cannot be created: {error.strerror}.") from error
    return folder


@contextmanager
def claimed(run_dir: str, resuming: bool) -> Iterator[None]:
    """Makes this process the owner of the folder of a training run, a new one or one to resume, within the block.

    What an earlier try left that ended before its first checkpoint is moved aside, so that its curves do not mix with
    those of this run.

    Raises:
        UserError: another process owns the folder, or it holds a run and this one is new.
    """
    folder = Path(run_dir)
    ours = (folder / OWNER).exists()  # a command of this program wrote there before
    with owned(folder):
        if not holds_run(folder):
            if (folder / CONFIG).exists():
                if not ours:
                    raise UserError(f"run_dir: {folder} has a {CONFIG} that is of no run; choose another folder.")
                left = set_aside(folder, (CONFIG, CURVES, FINDINGS, TENSORBOARD, CHECKPOINTS))
                print(f"{folder} has no checkpoint yet; what an earlier try left there is now in {left}.")
        elif not resuming:
            raise UserError(
                f"run_dir: {folder} already holds a run; choose another folder with --run_dir, or resume that run with "
                "--ckpt_path last."
            )
        yield


def holds_run(folder: Path) -> bool:
    """Tells whether a run folder has a checkpoint or an export: something that took time to make."""
    exports = (is_complete(path) for path in (*folder.glob(f"{EXPORT}*"), previous_path(folder / EXPORT)))
    return any(exports) or any(not p.name.startswith((PARTIAL, TRASH)) for p in folder.rglob("*.ckpt"))


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


@contextmanager
def owned(folder: Path, setting: str = "run_dir", patience: float = 0) -> Iterator[None]:
    """Keeps other processes from owning a folder within the block, by a lock that ends with this process at the latest.

    Args:
        folder: a folder that exists; one process can own it several times.
        setting: how the user names it, for messages.
        patience: seconds to wait for another owner.

    Raises:
        UserError: another process owns it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder.resolve() / LOCK, thread_local=False, is_singleton=True)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not patience:
                raise
            print(f"{folder} is in use by {_owner(folder)}; waiting up to {patience:.0f} s for its end", flush=True)
            lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(
            f"{setting}: {folder} is in use by {_owner(folder)}; wait for its end, stop it, or choose another folder "
            f"with --{setting}."
        ) from None
    except OSError as error:  # a file system without locks
        warnings.warn(f"{folder} cannot be locked ({error}); make sure that nothing else writes into it.", stacklevel=2)
    try:
        with suppress_os_errors():  # a full disk is no news here
            command = shorten(f"train.py {shlex.join(sys.argv[1:])}", 200)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": strftime("%F %T"), "command": command}
            write_text(folder / OWNER, json.dumps(owner) + "\n")
        yield
    finally:
        lock.release()


def _owner(folder: Path) -> str:
    """Describes the process that owns a folder, by the file that it has written there."""
    try:
        owner = json.loads((folder / OWNER).read_text())
        return "process {pid} on {host}, since {since} ({command})".format(**owner)
    except (OSError, ValueError, KeyError):  # it is just about to write it
        return "another process"


def set_aside(place: Path, only: Sequence[str] | None = None) -> Path:
    """Moves what is in a folder to the first free folder beside it, `sft.1`, or a table to `responses.1.parquet`.

    The folder itself stays, so that its owner owns it still; the notes and parts of a table move with it.

    Args:
        place: the folder or the table.
        only: names of what is moved; None: all.
    """
    place = place if place.name else place.resolve()
    stem, suffix = (place.name, "") if place.is_dir() else (place.stem, place.suffix)
    names = (place.with_name(f"{stem}.{number}{suffix}") for number in count(1))
    target = next(path for path in names if not any(path.parent.glob(f"{path.name}*")))
    if place.is_dir():
        target.mkdir()
        moves = {path: target / path.name for path in place.iterdir() if _moves(path.name, only)}
    else:
        moves = {_named(place, ending): _named(target, ending) for ending in ("", NOTES, PARTS)}
    for old, new in moves.items():
        if old.exists():
            old.rename(new)
    return target


def _moves(name: str, only: Sequence[str] | None) -> bool:
    return name not in (LOCK, OWNER) and (only is None or name in only)


def _named(table: Path, ending: str) -> Path:
    return table.with_name(f"{table.name}{ending}")


# ------------------------------------------------------------------------------------------- whole, or not at all

PARTIAL, PREVIOUS, TRASH = ".partial-", ".previous-", ".trash-"


def partial_path(path: Path) -> Path:
    """Returns where a file or folder lies while it is being written."""
    return path.with_name(f"{PARTIAL}{path.name}")


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
