"""Under autocast the frozen models of PPO keep half of their memory, and every number stays what it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.models.loading import load_causal_lm
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import PAD_TOKEN, load_tokenizer
from rlhf.modules import PPOModule, PPOSettings, ppo_models

Make = Callable[..., Any]


@pytest.fixture(params=["gpt_neox", "llama", "llama, tied"])
def policy_path(request: pytest.FixtureRequest, model_path: str, llama_path: str, tmp_path: Path) -> str:
    """A model with an output layer of its own, or with that of the embedding."""
    if request.param == "gpt_neox":
        return model_path
    if request.param == "llama":
        return llama_path
    folder = tmp_path / "tied"
    shutil.copytree(llama_path, folder)
    model = load_causal_lm(llama_path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return str(folder)


def halves(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}


def test_a_rollout_has_the_same_bits(
    policy_path: str, tmp_path: Path, trainer: Make, rollout_data: Make, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    tokenizer = load_tokenizer(policy_path, PAD_TOKEN)
    ScalarModel.from_policy(policy_path, seed=3).save(tmp_path / "reward", tokenizer)
    found = {}
    for how in ("float32", "device", "cpu"):
        with monkeypatch.context() as patch:
            if how == "float32":
                patch.setattr(ppo_models, "keep_half", lambda *_: None)
            where: Any = dict.fromkeys(("reference_placement", "reward_placement"), "cpu" if how == "cpu" else "device")
            module = PPOModule(
                policy_path, str(tmp_path / "reward"), ppo=PPOSettings(response_length=8, ppo_epochs=1), **where,
                pad_token=tokenizer.pad_token,
            )  # fmt: skip
            data = rollout_data(micro_batch_size=8, rollout_batch_size=8)
            fit = trainer(precision="bf16-mixed", limit_val_batches=0)
            fit.fit(module, data)
        rollout = data.last_rollout
        assert rollout.kl.abs().max() == 0  # of the first update, where the policy is the reference
        assert fit.callback_metrics["val/ratio_max_deviation"] <= (0 if device == "cpu" else 1e-5)
        found[how] = rollout
        models = [frozen._model for frozen in module.frozen_models]
        assert not halves(module.actor_critic)
        for model in models:
            linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
            others = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
            head = {id(model.head_weight)} if isinstance(model, ScalarModel) else set()
            wanted = set() if how == "float32" else linear - others - head
            weights = {name: id(weight) for name, weight in model.named_parameters() if weight.dim() > 1}
            assert {weights[name] for name in halves(model) if name in weights} == wanted
    for how in ("device", "cpu"):
        for name in ("responses", "logprobs", "ref_logprobs", "scores", "returns"):
            assert torch.equal(getattr(found[how], name), getattr(found["float32"], name)), (how, name)


def test_without_autocast_they_stay_as_they_are(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make
) -> None:
    module = PPOModule(model_path, reward_path, ppo=PPOSettings(response_length=8, ppo_epochs=1))
    trainer(limit_val_batches=0).fit(module, rollout_data())
    assert {p.dtype for frozen in module.frozen_models for p in frozen.parameters()} == {torch.float32}
