from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from rlhf import strategies
from rlhf.data.demonstrations import SFTDataModule
from rlhf.errors import UserError
from rlhf.modules import SFTModule
from rlhf.strategies import Zero2Strategy, check_strategy

ROOT = Path(__file__).parent.parent


def trainer(strategy: Any = "zero2", **settings: Any) -> Trainer:
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False} | settings
    return Trainer(strategy=strategy, **settings)


def attached(strategy: Any, **state: Any) -> Any:
    """A strategy in a Trainer of which only `state` is there."""
    strategy._lightning_module = SimpleNamespace(trainer=SimpleNamespace(**state))
    return strategy


def test_the_settings_that_make_it_right() -> None:
    config = Zero2Strategy().config
    assert config["zero_optimization"]["stage"] == 2
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert Zero2Strategy(grad_accum_dtype="bf16").config["data_types"] == {"grad_accum_dtype": "bf16"}


def test_the_offloading_variant_differs_in_that_alone() -> None:
    usual, offload = trainer("zero2").strategy.config, trainer("zero2_offload").strategy.config
    assert offload["zero_optimization"].pop("offload_optimizer")["device"] == "cpu"
    assert offload == usual


def test_a_deepspeed_config_keeps_what_makes_it_right() -> None:
    strategy = Zero2Strategy(config={"zero_optimization": {"stage": 2, "overlap_comm": False}})
    assert strategy.config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert strategy.config["zero_allow_untested_optimizer"]
    assert not strategy.config["zero_optimization"]["overlap_comm"]


@pytest.mark.parametrize("config", [{"zero_optimization": {"stage": 3}}, {"zero_optimization": {"stage": 1}}, {}])
def test_a_deepspeed_config_of_another_stage_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ZeRO stage 2, but its DeepSpeed config has stage"):
        Zero2Strategy(config=config)


def test_without_deepspeed_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs DeepSpeed, which is not installed here: pip install deepspeed"):
        Zero2Strategy()


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_lightnings_own_deepspeed_strategies_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"use --trainer\.strategy zero2"):
        check_strategy(trainer(name))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "zero2"])
@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_true_16_bit_is_refused_and_mixed_is_not(strategy: str, precision: str) -> None:
    with pytest.raises(UserError, match=f"use {precision}-mixed"):
        check_strategy(trainer(strategy, precision=f"{precision}-true"))
    check_strategy(trainer(strategy, precision="bf16-mixed"))
    check_strategy(trainer(strategy))


def test_what_mps_cannot_do_is_refused() -> None:
    def on_mps(**settings: Any) -> Trainer:
        made = trainer(**settings)
        made.strategy.accelerator = MPSAccelerator()
        return made

    check_strategy(on_mps(strategy="auto"))
    check_strategy(on_mps(strategy="auto", precision="bf16-mixed"))
    with pytest.raises(UserError, match=r"zero2 does not run on MPS; use --trainer\.accelerator cpu"):
        check_strategy(on_mps(strategy="zero2"))
    scaled = on_mps(strategy="auto")
    scaled.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match="16-mixed needs a loss scaler, which MPS lacks; use bf16-mixed"):
        check_strategy(scaled)


def test_a_stage_refuses_before_it_loads_its_model(model_path: str, sft_data: Callable[..., SFTDataModule]) -> None:
    module = SFTModule(model_path)
    with pytest.raises(UserError, match="bf16-mixed"):
        trainer("auto", precision="bf16-true").fit(module, sft_data())
    assert module.model is None


def test_the_command_line_refuses_in_one_sentence(
    model_path: str, demonstration_file: str, tmp_path: Path, driver: Callable[..., list[int]]
) -> None:
    words = [
        "fit", f"--config={ROOT}/configs/quickstart/sft.yaml",
        f"--run_dir={tmp_path}/run", f"--model.model_path={model_path}", f"--data.train.path={demonstration_file}",
        "--data.validation=null", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=deepspeed_stage_2",
    ]  # fmt: skip
    log = tmp_path / "log"
    assert driver(words, 1, log) == [2]
    said = log.read_text()
    assert next(line for line in said.splitlines() if line.startswith("error")).endswith("zero2.")
    assert "Traceback" not in said
    assert "MEMBER" not in said  # no second process was started


@pytest.mark.parametrize(
    ("batches", "dry", "refused"), [(8, False, False), (6, False, True), (5, False, True), (6, True, False)]
)
def test_an_epoch_that_ends_within_an_optimizer_step_is_refused(batches: int, dry: bool, refused: bool) -> None:
    strategy = attached(Zero2Strategy(), num_training_batches=batches, accumulate_grad_batches=4, fast_dev_run=dry)
    if not refused:
        strategy.on_train_start()
        return
    with pytest.raises(UserError, match=f"leaves {batches} micro-batches per epoch"):
        strategy.on_train_start()


def test_without_zero2_an_export_takes_the_weights_as_they_are() -> None:
    module: Any = nn.Linear(2, 2).bfloat16()
    before = dict(module.named_parameters())
    with strategies.full_precision(trainer("auto", precision="bf16-mixed"), module):
        assert all(before[name] is p for name, p in module.named_parameters())


def test_an_export_takes_a_weight_that_was_changed_after_the_last_step_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed.utils

    module: Any = nn.Linear(3, 1)
    stepped = {name: p.detach() + 1e-4 for name, p in module.named_parameters()}  # what the optimizer has in float32
    module.bfloat16()
    for name, p in module.named_parameters():
        p.data = stepped[name].bfloat16()
    module.bias.data.fill_(0.25)  # as the shift of a reward model
    own = dict(module.named_parameters())
    found = {id(p): stepped[name] for name, p in own.items()}
    monkeypatch.setattr(deepspeed.utils, "safe_get_full_fp32_param", lambda p: found[id(p)])
    fake: Any = SimpleNamespace(strategy=Zero2Strategy(), precision="bf16-mixed", is_global_zero=True)
    with strategies.full_precision(fake, module):
        assert torch.equal(module.weight, stepped["weight"])
        assert module.bias.item() == 0.25
    assert all(own[name] is p for name, p in module.named_parameters())
