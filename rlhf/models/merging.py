"""Adapters in an export, merged into their bases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf.models.adapter_files import ADAPTER_FILE
from rlhf.models.loading import is_classifier, load_causal_lm, load_config
from rlhf.models.saving import save_pretrained
from rlhf.models.scalar_model import ScalarModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGED = "merged"


def merge_exports(root: Path, export: Literal["adapter", "merged", "both"], tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds whole models to the adapters in an export, or puts them in their place.

    The base is read again, in float32, as that of the training may be quantised or in half precision.
    """
    if export == "adapter":
        return
    for folder in [file.parent for file in root.rglob(ADAPTER_FILE)]:
        path, setting, whole = str(folder), "the export", folder / MERGED
        if is_classifier(load_config(path, setting)):
            ScalarModel.from_pretrained(path, setting).save(whole, tokenizer)
        else:
            save_pretrained(load_causal_lm(path, setting), tokenizer, whole)
        if export == "merged":
            for file in filter(Path.is_file, list(folder.iterdir())):
                file.unlink()
            for file in list(whole.iterdir()):
                shutil.move(file, folder)
            whole.rmdir()
