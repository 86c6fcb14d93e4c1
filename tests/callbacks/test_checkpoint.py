"""Checkpoints: when they are written, what survives a kill, and that a resumed run is the run that never stopped."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from rlhf.callbacks import checkpoint_files
from rlhf.callbacks.checkpoint import LastCheckpoint
from rlhf.callbacks.checkpoint_files import AtomicCheckpointIO, find_last, partial_path, publish, read
from rlhf.callbacks.epoch_results import EpochResults
from rlhf.callbacks.resume import Resume, fingerprint, record
from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.modules import PPOModule, RewardModule, SFTModule
from rlhf.modules.settings import Optimization, PPOSettings

FAST = Optimization(learning_rate=1e-3)
PPO = PPOSettings(response_length=4, ppo_epochs=2, critic_warmup=0, kl_target=0.1)
NOT_COMPARED = ("seconds", "memory", "eps", "tokens_per", "invariants/demonstration_reward")
Make = Callable[..., Any]
Curves = dict[str, dict[int, float]]


class Kill(BaseException):
    """A kill that leaves the process of the tests alive."""


class Memory(DummyLogger):
    """Keeps the curves."""

    def __init__(self, curves: Curves) -> None:
        super().__init__()
        self.curves = curves

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if not name.startswith(NOT_COMPARED):
                self.curves.setdefault(name, {})[step or 0] = value


class At(Callback):
    """Does something in a hook, when it is called for the n-th time; by default it kills."""

    def __init__(self, hook: str, number: int, action: Callable[[], Any] | None = None) -> None:
        self.left, self.action = number, action
        setattr(self, hook, self.act)

    def act(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            if self.action is None:
                raise Kill
            self.action()


def weights(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """Where the checkpoint lies."""
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def fit(
    last: Path, trainer: Make, model_path: str, reward_path: str, sft_data: Make, preference_data: Make,
    rollout_data: Make,
) -> Make:  # fmt: skip
    """Trains a stage on 8 examples per step; with `resume`, from `last`. Returns the weights; adds to `curves`."""

    def fit(
        stage: str, *callbacks: Callback, curves: Curves | None = None, resume: bool = False,
        optimization: Optimization = FAST, reference: str | None = None, data: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Tensor:  # fmt: skip
        if stage == "ppo":
            module: Any = PPOModule(model_path, reward_path, None, None, reference, ppo=PPO, optimization=optimization)
        else:
            module = {"sft": SFTModule, "reward": RewardModule}[stage](model_path, optimization=optimization)
        datamodule = {"sft": sft_data, "reward": preference_data, "ppo": rollout_data}[stage](**(data or {}))
        made = trainer(
            logger=Memory({} if curves is None else curves),
            callbacks=[LastCheckpoint(every_n_steps=1), *([Resume(last)] if resume else []), *callbacks],
            default_root_dir=last.parent.parent,
            **{"max_epochs": 3 if stage == "ppo" else 2, "log_every_n_steps": 1, "limit_val_batches": 0} | settings,
        )
        made.fit(module, datamodule, ckpt_path=last if resume else None)
        return weights(module)

    return fit


# ------------------------------------------------------------------------------------------------------ exact resume


@pytest.mark.parametrize(
    ("stage", "hook", "number"),
    [
        ("sft", "on_train_batch_start", 12),
        ("sft", "on_validation_end", 3),
        ("sft", "on_train_epoch_end", 1),
        ("reward", "on_train_batch_end", 4),
        ("ppo", "on_train_batch_start", 7),
        ("ppo", "on_train_epoch_end", 2),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(fit: Make, stage: str, hook: str, number: int) -> None:
    settings = {} if stage == "ppo" else {"val_check_interval": 4, "limit_val_batches": 1}
    expected: Curves = {}
    final = fit(stage, curves=expected, **settings)
    curves: Curves = {}
    with pytest.raises(Kill):
        fit(stage, At(hook, number), curves=curves, **settings)
    assert torch.equal(fit(stage, resume=True, curves=curves, **settings), final)
    assert curves == expected
    loss = {"sft": "loss/sft", "reward": "loss/reward", "ppo": "loss/policy_avg"}[stage]
    assert len(curves[loss]) == (3 if stage == "ppo" else 2)


def test_a_run_limited_by_steps_goes_on_at_the_beginning_of_an_epoch(fit: Make) -> None:
    settings = {"max_epochs": -1, "max_steps": 10, "limit_val_batches": 1}
    expected: Curves = {}
    final = fit("sft", curves=expected, **settings)
    curves: Curves = {}
    with pytest.raises(Kill):
        fit("sft", At("on_train_batch_start", 9), curves=curves, **settings)  # 4 steps of 2 micro-batches in an epoch
    assert torch.equal(fit("sft", resume=True, curves=curves, **settings), final)
    assert curves == expected


def test_the_last_checkpoint_is_written_before_the_export(fit: Make, last: Path) -> None:
    order: list[bool] = []
    fit("sft", At("on_train_end", 1, lambda: order.append(read(last)["global_step"] == 8)))
    assert order == [True]


def test_other_micro_batches_go_on_with_the_same_examples(fit: Make) -> None:
    def steps(seen: list[list[int]]) -> Callback:
        class Rows(Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx % trainer.accumulate_grad_batches == 0:
                    seen.append([])
                seen[-1] = sorted([*seen[-1], *batch["rows"]])

        return Rows()

    whole: list[list[int]] = []
    smooth = {"optimization": replace(FAST, eps=1.0), "max_epochs": 1}
    final = fit("sft", steps(whole), **smooth)
    with pytest.raises(Kill):
        fit("sft", At("on_train_batch_start", 6), **smooth)
    rest: list[list[int]] = []
    resumed = fit("sft", steps(rest), resume=True, data={"micro_batch_size": 2}, **smooth)
    assert len(whole) == 4
    assert rest == whole[2:]
    torch.testing.assert_close(resumed, final, atol=1e-7, rtol=0)


def test_sums_of_two_processes_go_on_in_one(fit: Make) -> None:
    mean = {"kind": "mean", "name": "a", "options": {}}
    saved = [{"a": mean | {"value": 1.0, "weight": 2}}, {"a": mean | {"value": 3.0, "weight": 1}}]
    (first,) = EpochResults(saved, 0, 1)._left.values()
    assert (first["value"], first["weight"]) == (4.0, 3)
    (second,) = EpochResults([*saved, *saved], 1, 2)._left.values()
    assert (second["value"], second["weight"]) == (0.0, 0)


def test_what_is_typed_wins_over_the_checkpoint(fit: Make) -> None:
    def rates(typed: Optimization) -> list[float]:
        with pytest.raises(Kill):
            fit("sft", At("on_train_batch_start", 6), optimization=replace(FAST, schedule="linear"), max_epochs=1)
        curves: Curves = {}
        seen: list[float] = []

        class Look(Callback):
            def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
                group = trainer.optimizers[0].param_groups[0]
                seen.extend([group["weight_decay"], group["eps"]])

        fit("sft", Look(), resume=True, curves=curves, optimization=typed, max_epochs=1)
        return [*(curves["lr"][n] for n in sorted(curves["lr"])), *seen]

    same = rates(replace(FAST, schedule="linear"))
    assert same == pytest.approx([5e-4, 2.5e-4, 0.01, 1e-5])
    typed = Optimization(learning_rate=4e-3, schedule="linear", weight_decay=0.5, eps=1e-6)
    assert rates(typed) == pytest.approx([2e-3, 1e-3, 0.5, 1e-6])


# ------------------------------------------------------------------------------------------------------------ SIGTERM


@pytest.mark.parametrize(("stage", "number"), [("sft", 5), ("ppo", 6)])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_stops(
    fit: Make, last: Path, stage: str, number: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected: Curves = {}
    final = fit(stage, curves=expected)
    before = signal.getsignal(signal.Signals[name])
    curves: Curves = {}
    send = At("on_train_batch_start", number, lambda: os.kill(os.getpid(), signal.Signals[name]))
    with pytest.raises(SystemExit) as stop:
        fit(stage, send, curves=curves)
    assert stop.value.code == 128 + signal.Signals[name]
    assert signal.getsignal(signal.Signals[name]) == before
    out = capsys.readouterr().out
    where = "after step 3" if stage == "sft" else "in update 2, which will begin anew"
    assert f"Stopped by {name} {where}. Saved: {last}; go on with --ckpt_path last." in out
    assert read(last)["global_step"] == (3 if stage == "sft" else 2)
    assert torch.equal(fit(stage, resume=True, curves=curves), final)
    assert curves == expected


# --------------------------------------------------------------------------------------------------- files on the disk


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


@pytest.mark.parametrize(("old", "new"), [("file", "file"), ("folder", "folder"), ("folder", "file")])
def test_whenever_writing_stops_a_complete_checkpoint_is_found(tmp_path: Path, old: str, new: str) -> None:
    def write(path: Path, kind: str, text: str) -> None:
        files = [path] if kind == "file" else [path / "checkpoint" / "a", path / "checkpoint" / "b"]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    def content(path: Path) -> str:
        return path.read_text() if path.is_file() else "".join(f.read_text() for f in path.rglob("[ab]"))

    def publish_last(folder: Path, kind: str, text: str) -> None:
        partial = partial_path(folder / "last.ckpt")
        write(partial, kind, text)
        publish(partial, folder / "last.ckpt")

    whole = {"file": ("old", "new"), "folder": ("oldold", "newnew")}
    found = []
    for calls in range(12):
        folder = tmp_path / str(calls)
        write(folder / "last.ckpt", old, "old")
        with killed_after(calls):
            publish_last(folder, new, "new")
        last = find_last(folder)
        assert last is not None
        found.append(content(last))
        checkpoint_files.remove(partial_path(folder / "last.ckpt"))
        publish_last(folder, new, "new")  # as a run does that goes on
        assert content(folder / "last.ckpt") == whole[new][1]
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    steps = found.index(whole[new][1])
    assert steps == (1 if old == "file" else 2)
    assert found == [whole[old][0]] * steps + [whole[new][1]] * (12 - steps)


def test_a_full_disk_leaves_the_checkpoint_before(fit: Make, last: Path, recwarn: pytest.WarningsRecorder) -> None:
    def room(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    kept: list[int] = []
    try:
        final = fit(
            "sft", At("on_train_batch_start", 5, room(30_000)),
            At("on_train_batch_start", 8, lambda: kept.append(read(last)["global_step"])),
            At("on_train_batch_start", 10, room(resource.RLIM_INFINITY)), max_epochs=1, data={"micro_batch_size": 2},
        )  # fmt: skip
    finally:
        room(resource.RLIM_INFINITY)()
    assert kept == [1]
    assert read(last)["global_step"] == 4
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]
    assert torch.equal(final, fit("sft", max_epochs=1, data={"micro_batch_size": 2}))
    said = [str(w.message) for w in recwarn if "could not be written" in str(w.message)]
    assert (
        f"after step 2 could not be written: [Errno 27] File too large. The one before it is intact: {last}." in said[0]
    )
    assert len(said) == 1


def test_other_checkpoints_are_whole_too(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)

    class Broken:
        def __reduce__(self) -> Any:
            raise Kill

    with pytest.raises(Kill):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100), "b": Broken()}, path)
    assert torch.load(path) == {"a": 1}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def stage(sft_data: Make, model_path: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of a Trainer and a module as a checkpoint names."""
    rows = [{"input_ids": [n]} for n in range(9)]
    data = SimpleNamespace(batch_size=8, splits={"train": rows})
    trainer = SimpleNamespace(datamodule=data, strategy=None, world_size=2, accumulate_grad_batches=1)
    module = SimpleNamespace(model_path=model_path, reference_path=None, tokenizer=tokenizer, seed=1)
    return SimpleNamespace(trainer=trainer, module=module, data=data)


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("model.model_path was", lambda s, p: setattr(s.module, "model_path", p)),
        ("model.reward_path was None, but now it is", lambda s, p: setattr(s.module, "reward_path", p)),
        ("model.reference_path was", lambda s, p: setattr(s.module, "reference_path", p)),
        ("the tokenizer of model.model_path was", lambda s, p: setattr(s.module, "tokenizer", EmptyTokenizer())),
        ("data.batch_size was 8, but now it is 16", lambda s, p: setattr(s.data, "batch_size", 16)),
        ("data.train was 9 rows, but now it is 8 rows", lambda s, p: s.data.splits["train"].pop()),
        ("data.train was 9 rows, which is no longer", lambda s, p: s.data.splits["train"].reverse()),
        ("seed_everything was 1, but now it is 2", lambda s, p: setattr(s.module, "seed", 2)),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_by_name(
    stage: Any, tmp_path: Path, reward_path: str, setting: str, change: Callable[[Any, str], None]
) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"rlhf": record(stage.trainer, stage.module)}, path)
    Resume(path).setup(stage.trainer, stage.module, "fit")
    change(stage, reward_path)
    Resume(path).setup(stage.trainer, stage.module, "validate")
    with pytest.raises(UserError, match=rf"ckpt_path: the run of {path} can't go on: .*{setting}.*--run_dir"):
        Resume(path).setup(stage.trainer, stage.module, "fit")


class EmptyTokenizer:
    """Has one token."""

    pad_token_id = eos_token_id = 0

    def __len__(self) -> int:
        return 1


def test_a_checkpoint_of_another_stage_is_refused_before_weights_are_loaded(
    fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("sft", limit_train_batches=2, max_epochs=1)
    monkeypatch.setattr(RewardModule, "configure_model", lambda self: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="model was SFTModule, but now it is RewardModule"):
        fit("reward", resume=True)


@pytest.mark.parametrize(
    ("parts", "processes", "zero", "message"),
    [
        (1, 2, True, "has the parts of 1 processes out of 2"),
        (2, 3, True, "is of 2 processes, and each has a part of it; now there are 3"),
        (2, 2, False, "written with ZeRO, and trainer.strategy is now one without"),
        (0, 2, True, "written without ZeRO, and trainer.strategy is now one with;"),
    ],
)
def test_zero_needs_its_own_parts(
    stage: Any, tmp_path: Path, parts: int, processes: int, zero: bool, message: str
) -> None:
    path = tmp_path / "last.ckpt"
    files = [path]
    if parts:
        (path / "checkpoint").mkdir(parents=True)
        names = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in range(parts))]
        files = [path / "checkpoint" / name for name in names]
    for file in files:
        torch.save({"rlhf": record(stage.trainer, stage.module)}, file)
    stage.trainer.strategy = object.__new__(DeepSpeedStrategy) if zero else None
    stage.trainer.world_size = processes
    with pytest.raises(UserError, match=message):
        Resume(path).setup(stage.trainer, stage.module, "fit")


def test_a_checkpoint_of_another_program_is_refused(stage: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="does not say what it was made with"):
        Resume(tmp_path / "a.ckpt").setup(stage.trainer, stage.module, "fit")


@pytest.mark.parametrize("content", ["cut", "text", "folder", "zip"])
def test_what_is_no_whole_checkpoint_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1000)}, path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif content == "text":
        path.write_text("not a checkpoint")
    elif content == "zip":
        torch.save([1], path)
    else:
        whole = path.read_bytes()
        path.unlink()
        (path / "checkpoint").mkdir(parents=True)
        (path / "checkpoint" / "mp_rank_00_model_states.pt").write_bytes(whole)
        (path / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(whole[:-500])
    with pytest.raises(UserError, match=f"ckpt_path: {path} is no"):
        read(path)
    if content == "cut":
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--model=SFTModule", "--data=SFTDataModule", "--model.model_path=x", "--data.train.path=x",
                  f"--run_dir={tmp_path}/run", f"--ckpt_path={path}"])  # fmt: skip
        assert stop.value.code == 2
        assert f"{path} is no complete checkpoint" in capsys.readouterr().err


def test_a_model_is_known_by_its_weights_wherever_it_lies(model_path: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_path, copy)
    assert fingerprint(str(copy)) == fingerprint(model_path)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert fingerprint(str(copy)) != fingerprint(model_path)
    assert fingerprint("owner/name") == "owner/name"
