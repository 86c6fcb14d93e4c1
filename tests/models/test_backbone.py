"""The last layer's MLP leaves out what nobody reads, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

from rlhf.models.backbone import hidden_states, last_mlp
from rlhf.models.loading import checkpoint_activations
from rlhf.ops.sequences import pad_sequences

WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PLAIN = {
    "gpt_neox": GPTNeoXConfig(vocab_size=64, **WIDTHS),
    "gpt_neox, one after the other": GPTNeoXConfig(vocab_size=64, use_parallel_residual=False, **WIDTHS),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
    "llama": LlamaConfig(vocab_size=64, **WIDTHS),
}
OTHER = {
    "bloom, with a residual": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
    "mixtral, with experts": MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=2, **WIDTHS),
}
ROWS, FIRST = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 20, 21, 22], [15, 16, 17, 18, 19]], 3


def build(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_read_is_the_same_and_so_are_its_gradients(name: str) -> None:
    model, (ids, mask) = build(PLAIN[name]), pad_sequences(ROWS, 0)
    seen: list[int] = []
    handle = last_mlp(model.base_model).register_forward_hook(lambda _, x, y: seen.append(x[0].shape[1]))  # type: ignore[union-attr]
    found = []
    for first in (0, FIRST):
        model.zero_grad()
        hidden = hidden_states(model, ids, mask, first)[:, FIRST:]
        (hidden * mask[:, FIRST:, None]).pow(2).sum().backward()
        found.append([hidden, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    handle.remove()
    assert seen == [ids.shape[1], ids.shape[1] - FIRST]
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


def test_no_hook_stays(tmp_path: Any) -> None:
    model, (ids, mask) = build(PLAIN["llama"]), pad_sequences(ROWS, 0)
    hidden_states(model, ids, mask, FIRST)
    mlp = last_mlp(model.base_model)
    assert mlp is not None
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks


@pytest.mark.parametrize("name", OTHER)
def test_an_mlp_that_is_no_function_of_each_token_alone_is_left_whole(name: str) -> None:
    model, (ids, mask) = build(OTHER[name]), pad_sequences(ROWS, 0)
    assert last_mlp(model.base_model) is None
    assert hidden_states(model, ids, mask, FIRST).shape[:2] == ids.shape


def test_with_activation_checkpointing_the_mlp_is_whole_as_it_runs_again() -> None:
    model, (ids, mask) = build(PLAIN["gpt_neox"]), pad_sequences(ROWS, 0)
    checkpoint_activations(model)
    hidden_states(model, ids, mask, FIRST)[:, FIRST:].sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
