from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from rlhf import files
from rlhf.callbacks.export import Export, write_export
from rlhf.errors import UserError
from rlhf.files import LOCK, is_complete, owned, previous_path
from rlhf.models.loading import load_causal_lm
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parent.parent.parent


class Kill(BaseException):
    """A kill that leaves the process of the tests alive."""


class Module:
    device, kind, lora = "cpu", "sft", None

    def __init__(self, text: str = "new", error: BaseException | None = None, failed_elsewhere: bool = False) -> None:
        self.error = error
        self.text = text
        self.failed_elsewhere, self.reductions = failed_elsewhere, 0

    def prepare_export(self) -> None: ...

    def named_parameters(self) -> Any:
        return iter([("weight", torch.zeros(2))])

    def save_export(self, folder: Path) -> None:
        (folder / "weights").write_text(self.text)
        if self.error:
            raise self.error

    def reduce_max(self, x: Any) -> Any:
        self.reductions += 1  # the first one is of whether the weights can be saved at all
        return x + (self.failed_elsewhere and self.reductions > 1)


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """As much of a Trainer as an export needs."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    return SimpleNamespace(
        default_root_dir=tmp_path, is_global_zero=True, strategy=None, current_epoch=3, global_step=12
    )


FULL = "No space left on device"


def text_of(folder: Path) -> str:
    assert is_complete(folder)
    return (folder / "weights").read_text()


@pytest.mark.parametrize(
    "error", [OSError(28, FULL), SafetensorError(f"I/O error: {FULL}"), Exception(f"{FULL} (os error 28)")]
)
def test_a_full_disk_leaves_the_old_export_and_is_said_in_one_sentence(
    trainer: Any, tmp_path: Path, error: Exception
) -> None:
    Export.export(trainer, Module("old"), "export")
    message = rf"The export {tmp_path}/export could not be written: .*{FULL}.* Free some space; the checkpoint .* is "
    with pytest.raises(UserError, match=message + "intact, and --ckpt_path last writes the export again"):
        Export.export(trainer, Module(error=error), "export")
    assert text_of(tmp_path / "export") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "export"]


def test_a_full_disk_of_another_process_ends_this_one_too(trainer: Any, tmp_path: Path) -> None:
    trainer.is_global_zero = False
    with pytest.raises(UserError, match="could not be written, see what the first process says"):
        Export.export(trainer, Module(failed_elsewhere=True), "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("here", [True, False])
def test_weights_that_are_not_finite_on_any_process_are_not_exported(trainer: Any, tmp_path: Path, here: bool) -> None:
    module = Module()
    weights = torch.tensor([0.0, float("inf")]) if here else torch.zeros(2)
    module.named_parameters = lambda: iter([("weight", weights)])  # type: ignore[method-assign]
    module.reduce_max = lambda x: x + (not here)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="weights are not finite after step 12" if here else "Another process has"):
        Export.export(trainer, module, "export")
    assert not (tmp_path / "export").exists()


def test_a_run_whose_folder_is_anothers_by_now_writes_nothing_there(trainer: Any, tmp_path: Path) -> None:
    with owned(tmp_path):
        (tmp_path / LOCK).rename(tmp_path / "old")
        (tmp_path / LOCK).touch()
        with pytest.raises(UserError, match=f"run_dir: {tmp_path} was deleted, and is another run's by now"):
            Export.export(trainer, Module(), "export")
    assert not (tmp_path / "export").exists()


def test_a_fault_of_the_code_is_not_a_full_disk(trainer: Any) -> None:
    with pytest.raises(KeyError, match="name"):
        Export.export(trainer, Module(error=KeyError("name")), "export")


def test_a_kill_leaves_the_old_export_or_the_new_one(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: Any) -> None:
        raise Kill

    final = tmp_path / "export"
    Export.export(trainer, Module("old"), "export")
    with pytest.raises(Kill):
        Export.export(trainer, Module(error=Kill()), "export")
    assert text_of(final) == "old"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)  # when the old one was moved away already
        with pytest.raises(Kill):
            Export.export(trainer, Module(), "export")
    assert text_of(final if final.exists() else previous_path(final)) == "old"
    Export.export(trainer, Module("newer"), "export")
    assert text_of(final) == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "export"]


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_full_disk_of_one_process_stops_both_and_the_same_run_writes_the_export_later(
    driver: Callable[..., list[int]], strategy: str, model_path: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    data, run, log = write_jsonl("d.jsonl", demonstrations(8, 1, "train")), tmp_path / "run", tmp_path / "log"
    words = [
        "fit", f"--config={ROOT}/configs/quickstart/sft.yaml", f"--run_dir={run}", f"--model.model_path={model_path}",
        f"--data.train.path={data}", f"--data.validation.path={data}", "--data.validation.split=train",
        "--data.batch_size=8", "--data.micro_batch_size=4", "--trainer.accelerator=cpu", "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=0", "--trainer.devices=2", f"--trainer.strategy={strategy}",
    ]  # fmt: skip
    at = "--trainer.callbacks"
    full = [
        f"{at}+=rlhf.callbacks.last_checkpoint.LastCheckpoint", f"{at}+=resume_callbacks.Happens", f"{at}.rank=0",
        f"{at}.event=small_disk", f"{at}.hook=on_train_end", f"{at}.number=1",
    ]  # fmt: skip
    assert driver([*words, *full], 2, log) == [2, 2], log.read_text()[-3000:]
    said = log.read_text()
    assert said.count("\nerror: ") == 1
    assert "Traceback" not in said
    assert "error: The export" in said
    assert "File too large" in said
    assert f"the checkpoint {run}/checkpoints/last.ckpt is intact" in said
    assert not (run / "export").exists()
    assert driver([*words, "--ckpt_path=last"], 2, log) == [0, 0], log.read_text()[-3000:]
    assert is_complete(run / "export")


def test_one_bit_in_the_weights_of_an_export_is_found_when_they_are_loaded(model_path: str, tmp_path: Path) -> None:
    class PPO(Module):
        def save_export(self, folder: Path) -> None:
            for place in (folder, folder / "critic"):
                shutil.copytree(model_path, place, dirs_exist_ok=True)

    export = tmp_path / "export"
    write_export(PPO(), export)  # type: ignore[arg-type]
    for folder in (export, export / "critic"):
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        load_causal_lm(str(folder), "model")
        file.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
        with pytest.raises(UserError, match=f"^model: {file} is damaged: .* delete checksums from {export}/rlhf.json"):
            load_causal_lm(str(folder), "model")
    manifest = json.loads((export / "rlhf.json").read_text())
    del manifest["checksums"]
    (export / "rlhf.json").write_text(json.dumps(manifest))
    load_causal_lm(str(export), "model")


def test_the_weights_of_an_export_are_read_for_their_sums_once(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    sums = files.checksums
    monkeypatch.setattr(files, "checksums", lambda folder, pattern: read.append(folder) or sums(folder, pattern))
    folder = Path(shutil.copytree(model_path, tmp_path / "export"))
    (folder / files.MANIFEST).write_text("{}")
    for _ in range(2):
        load_causal_lm(str(folder), "model.reference_path")
    assert read == [folder]


def test_manifest(trainer: Any, tmp_path: Path) -> None:
    folder = Export.export(trainer, Module(), "export")
    assert json.loads((folder / "rlhf.json").read_text()).items() >= {"stage": "Module", "steps": 12}.items()


@pytest.mark.parametrize(("epoch", "exported"), [(0, False), (1, True)])
def test_exports_during_the_run(trainer: Any, tmp_path: Path, epoch: int, exported: bool) -> None:
    trainer.current_epoch = epoch
    Export(every_n_epochs=2).on_train_epoch_end(trainer, Module())
    assert is_complete(tmp_path / "export-2") is exported


def test_the_best_export_so_far_is_kept(trainer: Any, tmp_path: Path) -> None:
    trainer.enable_validation, trainer.sanity_checking, trainer.state = True, False, SimpleNamespace(fn="fit")
    trainer.strategy = SimpleNamespace(broadcast=lambda value: value)
    progress = SimpleNamespace(is_last_batch=True)
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))

    def best_of(values: dict[int, float], metric: str, start: int = 0) -> tuple[str, int, float]:
        """Text, epoch and value of the best export after a run, or the rest of one, with these values."""
        trainer.global_step = start
        export = Export(best=metric)
        export.on_train_start(trainer, Module())
        for epoch, value in values.items():
            trainer.current_epoch, trainer.global_step = epoch - 1, epoch
            trainer.callback_metrics = {metric: torch.tensor(value)}
            export.on_validation_end(trainer, Module(f"{metric} {epoch}"))
        notes = json.loads((tmp_path / "export_best" / "rlhf.json").read_text())
        assert notes["metric"] == metric
        assert notes["epochs"] == notes["steps"]
        return text_of(tmp_path / "export_best"), notes["epochs"], notes["value"]

    assert best_of({1: float("nan"), 2: 1.5, 3: 3.5, 4: 3.5, 5: 2.5}, "score") == ("score 3", 3, 3.5)
    assert best_of({6: 3.0}, "score", start=5) == ("score 3", 3, 3.5)  # a resumed run
    assert best_of({6: 4.0}, "score", start=5) == ("score 6", 6, 4.0)
    assert best_of({2: 0.5, 3: 0.0}, "score", start=1) == ("score 2", 2, 0.5)  # what came later does not count
    assert best_of({1: 3.0, 2: 1.0, 3: 2.0}, "loss") == ("loss 2", 2, 1.0)


def test_a_best_export_by_a_curve_that_is_not_there(trainer: Any) -> None:
    trainer.enable_validation, trainer.state, trainer.sanity_checking = False, SimpleNamespace(fn="fit"), True
    with pytest.raises(UserError, match="best export by nothing, but nothing is validated"):
        Export(best="nothing").on_train_start(trainer, Module())
    trainer.callback_metrics = {"validation/eos": 1.0, "loss": 2.0}
    with pytest.raises(UserError, match="best is nothing, and the validation has only validation/eos"):
        Export(best="nothing").on_validation_end(trainer, Module())
