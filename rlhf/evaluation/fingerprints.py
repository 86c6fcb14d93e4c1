"""Short fingerprints of models and texts: whether a table was made from the same things."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_SAMPLE = 1 << 20  # bytes read at the start, in the middle and at the end of a file of weights
_WEIGHTS = (".safetensors", ".bin")


def of_texts(texts: Iterable[str]) -> str:
    """Of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def of_model(path: str, setting: str) -> str:
    """Of a model: its configuration, its manifest, and samples of its weights, wherever the folder lies.

    A model on the hub has its name and the commit of its configuration.

    Args:
        path: folder or hub name.
        setting: how the user names it, for messages.
    """
    from rlhf.files import MANIFEST
    from rlhf.models.loading import load_config

    config = load_config(path, setting)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    files = sorted(f for f in folder.iterdir() if f.suffix in _WEIGHTS or f.name in ("config.json", MANIFEST))
    return of_texts(text for file in files for text in (file.name, _sampled(file)))


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
            stream.seek(start)
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()
