"""Nothing in a checkpoint is run, and what is no checkpoint of this module is refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.strategies import FORCE, pickle_stages_by_value, safe_reading
from rlhf.synthetic.posts import demonstrations

Driver = Callable[[list[str], int, Path], list[int]]
ONE: list[str] = []
ZERO = ["--trainer.strategy=zero2"]
STATES, OWN = "checkpoint/mp_rank_00_model_states.pt", "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Marks:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> list[str]:
    """The settings of a run of SFT."""
    file = tmp_path_factory.mktemp("data") / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in demonstrations(4, 1, "train")))
    return [
        "--model=SFTModule", f"--model.model_path={model_path}", "--model.response_length=2", "--data=SFTDataModule",
        f"--data.train.path={file}", f"--data.validation.path={file}", "--data.batch_size=4",
        "--data.micro_batch_size=4", "--trainer.accelerator=cpu", "--trainer.devices=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(driver: Driver, stage: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """The checkpoint of a run that was made with some strategy."""
    made: dict[str, Path] = {}

    def train(strategy: list[str]) -> Path:
        if str(strategy) not in made:
            run = tmp_path_factory.mktemp("run") / "sft"
            assert driver(["fit", f"--run_dir={run}", *stage, *strategy], 1, run.parent / "log") == [0]
            made[str(strategy)] = run / "checkpoints" / "last.ckpt"
        return made[str(strategy)]

    return train


@pytest.fixture
def said(driver: Driver, stage: list[str], tmp_path: Path) -> Callable[..., str]:
    """Runs a command on a checkpoint, which it must refuse; returns the sentence."""

    def run(verb: str, checkpoint: Path | str, strategy: list[str]) -> str:
        log = tmp_path / "log"
        words = [verb, f"--run_dir={tmp_path / 'run'}", *stage, *strategy, f"--ckpt_path={checkpoint}"]
        assert driver([*words, *(["--trainer.max_epochs=2"] if verb == "fit" else [])], 1, log) == [2], log.read_text()
        assert "Traceback" not in log.read_text()
        return log.read_text().strip().splitlines()[-1]

    return run


@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
@pytest.mark.parametrize("part", ["", STATES, OWN])
def test_a_checkpoint_runs_nothing(
    verb: str, part: str, trained: Callable[..., Path], said: Callable[..., str], tmp_path: Path
) -> None:
    strategy = ZERO if part else ONE
    checkpoint = tmp_path / "evil.ckpt"
    (shutil.copytree if part else shutil.copy)(trained(strategy), checkpoint)
    file = checkpoint / part if part else checkpoint
    state = torch.load(file, weights_only=False)
    torch.save({**state, "epoch": Marks(tmp_path / "ran")}, file)
    assert "would run posix.mkdir" in said(verb, checkpoint, strategy)
    assert not (tmp_path / "ran").exists()


def test_deepspeed_cannot_read_what_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for `weights_only=False`; a part may be put there after the look at all of them."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.delenv(FORCE, raising=False)
    file, engine = tmp_path / "part.pt", TorchCheckpointEngine()
    torch.save({"x": Marks(tmp_path / "ran")}, file)
    with safe_reading(), pytest.raises(Exception, match=r"posix\.mkdir"):
        engine.load(str(file))
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))  # Python 3.11.2
    pickle_stages_by_value()
    torch.save({"stage": ZeroStageEnum.gradients, "scaler": LossScaler(2.0), "x": torch.ones(2)}, file)
    with safe_reading():
        found = engine.load(str(file))
    assert found["stage"] is ZeroStageEnum.gradients
    assert found["scaler"].loss_scale == 2.0
    assert FORCE not in os.environ


def _changed(state: Any, fault: str) -> Any:
    weights = state["state_dict"]
    name = next(key for key, value in weights.items() if value.dim() == 2)
    changes = {
        "list": [state],
        "text": "state",
        "no state_dict": {key: value for key, value in state.items() if key != "state_dict"},
        "weights alone": weights,
        "state_dict is a list": {**state, "state_dict": [*weights.values()]},
        "another model": {**state, "state_dict": {**weights, name: weights[name][1:]}},
        "a weight too many": {**state, "state_dict": {**weights, "more": torch.ones(1)}},
        "no tensor": {**state, "state_dict": {**weights, name: 3}},
        "NaN": {**state, "state_dict": {**weights, name: torch.full_like(weights[name], float("nan"))}},
    }
    return changes[fault]


FAULTS = {
    "list": "is no checkpoint of a training run",
    "text": "is no checkpoint of a training run",
    "no state_dict": "is no checkpoint of a training run",
    "weights alone": "is no checkpoint of a training run",
    "state_dict is a list": "is no checkpoint of a training run",
    "another model": "does not fit SFTModule and its model.model_path",
    "a weight too many": "does not fit SFTModule and its model.model_path: more is (1,) in the checkpoint",
    "no tensor": "does not fit SFTModule and its model.model_path",
    "NaN": "holds weights that are not finite",
    "empty": "is no complete checkpoint",
    "empty folder": "is a folder, but no checkpoint; give ",
    "cut": "is no complete checkpoint",
    "zip": "is no checkpoint that can be read",
    "old format": "is no complete checkpoint",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_checkpoint(
    fault: str, trained: Callable[..., Path], said: Callable[..., str], tmp_path: Path
) -> None:
    path, whole = tmp_path / "x.ckpt", trained(ONE)
    if fault == "empty":
        path.touch()
    elif fault == "empty folder":
        path.mkdir()
    elif fault == "cut":
        path.write_bytes(whole.read_bytes()[:-500])
    elif fault == "zip":
        shutil.make_archive(str(path), "zip", whole.parent.parent / "export")
        Path(f"{path}.zip").rename(path)
    elif fault == "old format":
        torch.save(torch.load(whole), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(_changed(torch.load(whole), fault), path)
    for verb in ("fit", "predict") if fault in ("list", "another model", "NaN") else ("validate",):
        assert f"error: ckpt_path: {path} {FAULTS[fault]}" in said(verb, path, ONE)


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_parts_need_zero_and_a_file_needs_none(
    verb: str, trained: Callable[..., Path], said: Callable[..., str]
) -> None:
    assert "was written with ZeRO, and trainer.strategy is now one without" in said(verb, trained(ZERO), ONE)
    assert "was written without ZeRO, and trainer.strategy is now one with" in said(verb, trained(ONE), ZERO)


def test_zero_refuses_weights_that_are_not_finite(
    trained: Callable[..., Path], said: Callable[..., str], tmp_path: Path
) -> None:
    path = shutil.copytree(trained(ZERO), tmp_path / "x.ckpt")
    state = torch.load(path / STATES, weights_only=False)
    state["module"] = {name: torch.full_like(weight, float("inf")) for name, weight in state["module"].items()}
    torch.save(state, path / STATES)
    assert f"ckpt_path: {path} holds weights that are not finite" in said("validate", path, ZERO)


@pytest.mark.parametrize("word", ["best", ""])
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_checkpoint_without_a_path(verb: str, word: str, said: Callable[..., str]) -> None:
    assert "give the path of a checkpoint, or last" in said(verb, word, ONE)
