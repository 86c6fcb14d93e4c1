"""The files of a run: where they lie, and how they are written so that neither a kill nor a full disk loses one."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import UserError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
CURVES = "curves.jsonl"
TENSORBOARD = "tensorboard"
EXPORT = "export"
MANIFEST = "rlhf.json"  # of an export: written last
NOTES = ".json"  # the settings of <table> are in <table>.json
PARTS = ".parts"  # the finished rows of an unfinished <table> are in the folder <table>.parts


def is_main_process() -> bool:
    """Tells whether this is the first process of the first node, by what Lightning, torchrun or SLURM set."""
    rank = next((os.environ[k] for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if k in os.environ), "0")
    return rank == os.environ.get("NODE_RANK", "0") == "0"


def claim(run_dir: str, resuming: bool, setting: str = "run_dir") -> Path:
    """Creates the folder of a new run, or finds that of a run to resume.

    Args:
        run_dir: the folder.
        resuming: the folder may hold a run.
        setting: how the user names it, for messages.

    Raises:
        UserError: it cannot be written, or it holds another run.
    """
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}: the folder {folder} cannot be created: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{setting}: the folder {folder} cannot be written.")
    if (folder / CONFIG).exists() and not resuming:
        raise UserError(
            f"{setting}: {folder} already holds a run; choose another folder with --{setting}, or resume that run with "
            "--ckpt_path last."
        )
    return folder


def is_complete(export: Path) -> bool:
    """Tells whether an export was finished."""
    return (export / MANIFEST).is_file()


# ------------------------------------------------------------------------------------------- whole, or not at all


def partial_path(path: Path) -> Path:
    """Returns where a file or folder lies while it is being written."""
    return path.with_name(f".partial-{path.name}")


def previous_path(path: Path) -> Path:
    """Returns where the old version of a folder lies while the new one takes its place."""
    return path.with_name(f".previous-{path.name}")


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
    trash = path.with_name(f".trash-{path.name}")
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
