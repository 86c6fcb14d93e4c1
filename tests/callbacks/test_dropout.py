from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from rlhf.callbacks.dropout import DisableDropout, disable_dropout, draws_random_numbers, keep_in_evaluation_mode
from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.scalar_model import ScalarModel

TRAINER: Any = SimpleNamespace(precision_plugin=Precision())

SHAPE = {
    "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "intermediate_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
DROPOUTS = [
    ("gpt_neox", ["attention_dropout"]),
    ("gpt_neox", ["hidden_dropout"]),
    ("gpt2", ["attn_pdrop"]),
    ("gpt2", ["resid_pdrop"]),
    ("gpt2", ["embd_pdrop"]),
    ("llama", ["attention_dropout"]),
    ("qwen2", ["attention_dropout"]),
    ("opt", ["dropout"]),
    ("opt", ["attention_dropout"]),
    ("opt", ["layerdrop"]),
    ("gpt_neox", ["attention_dropout", "hidden_dropout"]),
    ("gpt2", ["attn_pdrop", "resid_pdrop", "embd_pdrop"]),
    ("opt", ["dropout", "attention_dropout", "layerdrop"]),
]
OFF = (
    "attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "layerdrop",
    "classifier_dropout", "summary_first_dropout",
)  # fmt: skip


def language_model(architecture: str, dropouts: list[str], attention: str = "eager") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    probabilities = dict.fromkeys(OFF, 0.0) | dict.fromkeys(dropouts, 0.1)
    config = AutoConfig.for_model(architecture, **SHAPE, **probabilities)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("dropouts", [[], ["attention_dropout"]])
def test_a_fused_kernel_that_moves_the_state_on_is_no_dropout(
    dropouts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention

    def fused(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.backends.cuda.mem_efficient_sdp_enabled():
            torch.rand(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    assert draws_random_numbers(language_model("llama", dropouts, "sdpa")) == bool(dropouts)


class Module(LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.part = nn.Sequential(network)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("architecture", "dropouts"), DROPOUTS)
def test_every_dropout_is_found(architecture: str, dropouts: list[str], attention: str) -> None:
    model = language_model(architecture, dropouts, attention)
    assert draws_random_numbers(model)
    assert disable_dropout(model) > 0
    assert not draws_random_numbers(model)
    assert disable_dropout(model) == 0


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama", "qwen2", "opt"])
def test_a_model_without_dropout_draws_nothing(architecture: str) -> None:
    model = language_model(architecture, [])
    assert disable_dropout(model) == 0
    assert not draws_random_numbers(model)


def test_a_tiny_dropout_is_seen() -> None:
    """Two forwards would be bit-equal nearly always."""
    model = language_model("gpt_neox", [])
    model.gpt_neox.layers[1].mlp.act = nn.Sequential(nn.GELU(), nn.Dropout(1e-5))
    assert draws_random_numbers(model)
    assert disable_dropout(model) == 1
    assert not draws_random_numbers(model)


def test_other_settings_are_left_alone() -> None:
    model = language_model("gpt_neox", ["hidden_dropout"])
    before = {k: v for k, v in model.config.to_dict().items() if k != "hidden_dropout"}
    disable_dropout(model)
    assert {k: v for k, v in model.config.to_dict().items() if k != "hidden_dropout"} == before
    assert model.config.hidden_dropout == 0


def test_the_check_leaves_modes_and_random_state_alone() -> None:
    model = language_model("gpt2", ["resid_pdrop"]).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    assert draws_random_numbers(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrap", [lambda m: m, ScalarModel])
def test_the_callback_switches_off_what_it_finds(wrap: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = language_model("gpt_neox", ["hidden_dropout", "attention_dropout"])
    if wrap is ScalarModel:
        model.config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(model.config)
    DisableDropout().on_fit_start(TRAINER, Module(wrap(model)))
    assert not draws_random_numbers(model)


DBRX_ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("phimoe", {"num_local_experts": 4}),  # draws its experts
    ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.1}),
    (
        "dbrx",
        {
            "ffn_config": {"ffn_hidden_size": 8, "moe_jitter_eps": 0.1},
            "attn_config": DBRX_ATTENTION,
        },
    ),
]


@pytest.mark.parametrize(("architecture", "settings"), ROUTERS)
@torch.no_grad()
def test_routers_are_deterministic_and_compute_what_they_do_in_evaluation(
    architecture: str, settings: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = (
        SHAPE | dict.fromkeys(OFF, 0.0) | {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
    )
    shape["initializer_range"] = 0.2
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape | settings))
    ids = torch.arange(12).unsqueeze(0)
    expected = model.eval()(ids).logits
    assert disable_dropout(model) == 0
    assert draws_random_numbers(model)
    DisableDropout().on_fit_start(TRAINER, Module(model))  # type: ignore[arg-type]
    assert not draws_random_numbers(model)
    assert torch.equal(model.train()(ids).logits, expected)
    assert keep_in_evaluation_mode(model) == 0


class Hidden(nn.Module):
    """Noise that is always on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 1e-5, training=True)


def test_the_callback_refuses_what_it_cannot_switch_off() -> None:
    model = language_model("gpt_neox", [])
    model.gpt_neox.layers[0].mlp.act = Hidden()
    with pytest.raises(UserError, match="GPTNeoXForCausalLM still draws random numbers"):
        DisableDropout().on_fit_start(TRAINER, Module(model))


def test_a_critic_that_still_drops_is_refused_beside_a_policy_that_does_not() -> None:
    from transformers import AutoModelForSequenceClassification

    policy = language_model("gpt_neox", ["hidden_dropout"])
    policy.config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(policy.config)
    critic.gpt_neox.layers[1].mlp.act = Hidden()
    with pytest.raises(UserError, match="GPTNeoXForSequenceClassification still draws random numbers"):
        DisableDropout().on_fit_start(TRAINER, Module(ActorCritic(policy, ScalarModel(critic))))
