"""Checkpoints: when they are written, what survives a kill, and that a resumed run is the run that never stopped."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from rlhf.callbacks.checkpoint_io import read
from rlhf.callbacks.export import Export
from rlhf.callbacks.last_checkpoint import LastCheckpoint
from rlhf.callbacks.resume import Resume
from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.modules import PPOModule, RewardModule, SFTModule
from rlhf.modules.settings import Optimization, PPOSettings

FAST = Optimization(learning_rate=1e-3)
PPO = PPOSettings(response_length=4, ppo_epochs=2, critic_warmup=1, kl_target=0.1)
NOT_COMPARED = ("seconds", "memory", "eps", "tokens_per")
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
        optimization: Optimization = FAST, every: dict[str, int] | None = None,
        reference: str | None = None, data: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Tensor:  # fmt: skip
        if stage == "ppo":
            module: Any = PPOModule(model_path, reward_path, None, None, reference, ppo=PPO, optimization=optimization)
        else:
            module = {"sft": SFTModule, "reward": RewardModule}[stage](model_path, optimization=optimization)
        datamodule = {"sft": sft_data, "reward": preference_data, "ppo": rollout_data}[stage](**(data or {}))
        made = trainer(
            logger=Memory({} if curves is None else curves),
            callbacks=[
                LastCheckpoint(**(every or {"every_n_steps": 1})),
                *([Resume(last)] if resume else []),
                *callbacks,
            ],
            default_root_dir=last.parent.parent,
            **{"max_epochs": 3 if stage == "ppo" else 2, "log_every_n_steps": 1, "limit_val_batches": 0} | settings,
        )
        made.fit(module, datamodule, ckpt_path=last if resume else None)
        return weights(module)

    return fit


# ------------------------------------------------------------------------------------------------------ exact resume


@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        ("sft", [("on_train_batch_start", 12)]),
        ("sft", [("on_train_batch_start", 9), ("on_train_batch_start", 5)]),
        ("sft", [("on_validation_end", 3)]),
        ("sft", [("on_train_epoch_end", 1)]),
        ("reward", [("on_train_batch_end", 4)]),
        ("ppo", [("on_train_batch_start", 11)]),
        ("ppo", [("on_train_epoch_end", 2)]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(fit: Make, stage: str, kills: list[tuple[str, int]]) -> None:
    settings = {} if stage == "ppo" else {"val_check_interval": 4, "limit_val_batches": 1}
    expected: Curves = {}
    final = fit(stage, curves=expected, **settings)
    curves: Curves = {}
    for times, kill in enumerate(kills):
        with pytest.raises(Kill):
            fit(stage, At(*kill), curves=curves, resume=times > 0, **settings)
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


def test_the_last_step_is_saved_before_the_export(fit: Make, last: Path) -> None:
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


def test_steps_are_counted_over_the_ends_of_epochs(fit: Make, last: Path) -> None:
    with pytest.raises(Kill):  # in the first step of the second epoch; an epoch has 4
        fit("sft", At("on_train_batch_start", 10), every={"every_n_epochs": 9, "every_n_steps": 4})
    assert read(last)["global_step"] == 4


# ---------------------------------------------------------------------------------------- weights that are not finite


class Ruin(Callback):
    """An optimizer step, the n-th, that leaves one weight that is no number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(module.parameters()).view(-1)[0] = float("nan")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(fit: Make, last: Path, stage: str) -> None:
    """The check of losses and gradients sees them in the next step only, and of the last one there is none."""
    size, step = ({"max_epochs": 2}, 4) if stage == "ppo" else ({"max_epochs": 1, "limit_train_batches": 4}, 2)
    message = (
        f"not finite after step {step}, .* the one before, {last}, stays: .* lower model.optimization.learning_rate"
    )
    with pytest.raises(UserError, match=message):
        fit(stage, Ruin(step), Export(every_n_epochs=2), **size)
    assert read(last)["global_step"] == step // 2
    assert all(weight.isfinite().all() for weight in read(last)["state_dict"].values())
    assert not [*last.parent.parent.glob("export*")]


def test_a_learning_rate_that_ruins_the_weights_in_one_step_leaves_nothing(fit: Make, last: Path) -> None:
    ruin = replace(FAST, learning_rate=1e39)
    with pytest.raises(
        UserError, match=r"after step 1, so no checkpoint or export of them is written \(model.*\); start again"
    ):
        fit("sft", Export(), optimization=ruin, max_epochs=1, limit_train_batches=2)
    best = ModelCheckpoint(last.parent, save_weights_only=True, every_n_train_steps=1)
    with pytest.raises(UserError, match="after step 1, so no checkpoint"):
        fit("sft", best, optimization=ruin, enable_checkpointing=True)
    assert not [*last.parent.parent.rglob("*.ckpt"), *last.parent.parent.glob("export*")]


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
    where = "after step 3" if stage == "sft" else "in update 2, which will start again"
    assert f"Stopped by {name} {where}. Resume from {last} with --ckpt_path last." in out
    assert read(last)["global_step"] == (3 if stage == "sft" else 2)
    assert torch.equal(fit(stage, resume=True, curves=curves), final)
    assert curves == expected


# --------------------------------------------------------------------------------------------------- files on the disk


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


def test_a_disk_that_is_full_for_the_curves_too_ends_the_run_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(words: list[str]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.cli.stage.StageCLI.run", full)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == 2
    assert (
        "No space left on device. Free some space; the same command goes on, a training run with --ckpt_path last"
        in capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_checkpoint_of_another_stage_is_refused_before_weights_are_loaded(
    fit: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("sft", limit_train_batches=2, max_epochs=1)
    monkeypatch.setattr(RewardModule, "configure_model", lambda self: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="model was SFTModule, but now it is RewardModule"):
        fit("reward", resume=True)


def test_last_is_the_beginning_of_a_run_without_a_checkpoint(
    model_path: str, demonstration_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model=SFTModule", f"--model.model_path={model_path}", "--data=SFTDataModule", f"--run_dir={tmp_path}/run",
        f"--data.train.path={demonstration_file}", f"--data.test.path={demonstration_file}", "--data.batch_size=8",
        "--data.micro_batch_size=8", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=1",
        "--ckpt_path=last",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["validate", *words])
    assert f"ckpt_path: there is no checkpoint in {tmp_path}/run/checkpoints." in capsys.readouterr().err
    main(["fit", *words])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read(last)["global_step"] == 1
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    for verb in ("fit", "validate", "test", "predict"):
        with pytest.raises(SystemExit) as stop:
            main([verb, *words])
        assert stop.value.code == 2
        assert f"{last} is damaged: its contents are not those that were written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callback", "setting"),
    [
        ("last_checkpoint.LastCheckpoint", "every_n_steps=0"),
        ("export.Export", "every_n_epochs=-1"),
        ("invariants.Invariants", "highest_kl=0"),
        ("invariants.Invariants", "ratio=of"),
        ("sample_table.SampleTable", "rows=-1"),
        ("progress_bar.StageProgress", "every_seconds=-1"),
    ],
)
def test_settings_of_callbacks_that_make_no_sense_are_refused(
    callback: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--trainer.callbacks+=rlhf.callbacks.{callback}", f"--trainer.callbacks.{setting}"])
    assert setting.partition("=")[0] in capsys.readouterr().err
