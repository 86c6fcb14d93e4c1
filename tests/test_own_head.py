"""The stages on a model of which transformers knows no reward model, from SFT's check to margins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from rlhf.callbacks.export import Export
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.evaluation.margins import margins
from rlhf.models.loading import load_causal_lm
from rlhf.models.probes import backbone_of
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings, RewardModule

Make = Callable[..., Any]
FAST = Optimization(learning_rate=1e-3)
SETTINGS = PPOSettings(response_length=6, ppo_epochs=1)


@pytest.fixture
def cohere(tokenizer: Any, tmp_path: Path) -> str:
    """A tiny Cohere, without dropout and with a tokenizer of 500 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = AutoConfig.for_model("cohere", vocab_size=512, initializer_range=0.2, **shape, **special)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "cohere")
    tokenizer.save_pretrained(tmp_path / "cohere")
    return str(tmp_path / "cohere")


def short(queries: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    return [-float(len(response)) for response in responses]


def test_reward_model_margins_and_ppo(
    cohere: str, trainer: Make, preference_data: Make, rollout_data: Make, comparison_file: str, tmp_path: Path
) -> None:
    module = RewardModule(cohere, optimization=FAST)
    trainer(callbacks=[Export()], limit_val_batches=0).fit(module, datamodule=preference_data())
    reward = tmp_path / "run" / "export"
    trained = ScalarModel.from_pretrained(str(reward), "reward")
    assert not torch.equal(backbone_of(trained.model).norm.weight, backbone_of(load_causal_lm(cohere)).norm.weight)
    assert trained.bias.item() != 0  # centred
    table = margins(str(tmp_path / "margins.csv"), str(reward), Source(comparison_file))
    assert len(pd.read_csv(tmp_path / "margins.csv")) == len(table) == 24
    ppo = PPOModule(cohere, str(reward), ppo=SETTINGS, optimization=FAST)
    fit = trainer(callbacks=[Export()], limit_val_batches=0, default_root_dir=tmp_path / "ppo")
    fit.fit(ppo, datamodule=rollout_data())
    assert fit.callback_metrics["val/ratio_max_deviation"] < 1e-5
    assert fit.callback_metrics["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert type(load_causal_lm(str(tmp_path / "ppo" / "export"))).__name__ == "CohereForCausalLM"


def test_ppo_with_a_reward_function_alone(cohere: str, trainer: Make, rollout_data: Make) -> None:
    ppo = PPOModule(cohere, reward_function=short, ppo=SETTINGS, optimization=FAST)
    fit = trainer(limit_val_batches=0)
    fit.fit(ppo, datamodule=rollout_data())
    assert fit.callback_metrics["val/ratio_max_deviation"] < 1e-5
    assert fit.callback_metrics["loss/value_avg"] > 0


def test_stages_that_a_type_does_not_allow_are_refused_before_anything_is_loaded(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any, setting: str = "") -> bool:
        raise UserError(f"{setting}: only SFT works")

    for home in ("reward", "ppo_models"):
        monkeypatch.setattr(f"rlhf.modules.{home}.register_classifier", refuse)
    with pytest.raises(UserError, match=r"model\.model_path: only SFT works"):
        RewardModule(model_path)
    with pytest.raises(UserError, match=r"model\.model_path: only SFT works"):
        PPOModule(model_path, reward_function=short)
