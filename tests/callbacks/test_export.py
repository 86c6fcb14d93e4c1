from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.callbacks.export import Export, is_complete


class Module:
    def __init__(self, fails: bool = False, text: str = "new") -> None:
        self.fails = fails
        self.text = text

    def prepare_export(self) -> None: ...

    def save_export(self, folder: Path) -> None:
        (folder / "weights").write_text(self.text)
        if self.fails:
            raise OSError("no space left on device")


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """As much of a Trainer as an export needs."""
    strategy = SimpleNamespace(barrier=lambda name: None)
    return SimpleNamespace(
        default_root_dir=tmp_path, is_global_zero=True, strategy=strategy, current_epoch=3, global_step=12
    )


def test_an_export_is_all_or_nothing(trainer: Any, tmp_path: Path) -> None:
    Export.export(trainer, Module(text="old"), "export")
    with pytest.raises(OSError, match="no space"):
        Export.export(trainer, Module(fails=True), "export")
    assert is_complete(tmp_path / "export")
    assert (tmp_path / "export" / "weights").read_text() == "old"


def test_manifest(trainer: Any, tmp_path: Path) -> None:
    folder = Export.export(trainer, Module(), "export")
    assert json.loads((folder / "rlhf.json").read_text()).items() >= {"stage": "Module", "steps": 12}.items()


@pytest.mark.parametrize(("epoch", "exported"), [(0, False), (1, True)])
def test_exports_during_the_run(trainer: Any, tmp_path: Path, epoch: int, exported: bool) -> None:
    trainer.current_epoch = epoch
    Export(every_n_epochs=2).on_train_epoch_end(trainer, Module())
    assert is_complete(tmp_path / "export-2") is exported
