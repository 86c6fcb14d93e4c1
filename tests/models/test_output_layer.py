"""Log-probabilities by way of hidden states, for output layers that are a matrix and for those that are more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from rlhf.models.output_layer import logprobs_at, output_weight
from rlhf.ops.sequences import pad_sequences

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "initializer_range": 0.3,
}  # fmt: skip
SMALL: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
LINEAR = {
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "gpt2, tied": GPT2Config(**SMALL),
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=1),
}
MORE = {
    "phi, a bias": PhiConfig(**SHAPE),
    "gptj, a bias": GPTJConfig(**SMALL, rotary_dim=8),
    "gemma2, soft-capped": Gemma2Config(
        **SHAPE, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0, attn_implementation="eager"
    ),
    "cohere, scaled": CohereConfig(**SHAPE, logit_scale=0.3),
}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]


def build(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Auto.from_config(config).eval()
        layer = model.get_output_embeddings()
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    return model


@pytest.mark.parametrize("name", LINEAR)
def test_a_matrix_is_recognised(name: str) -> None:
    model = build(LINEAR[name])
    assert output_weight(model) is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", MORE)
def test_what_is_more_than_a_matrix_is_recognised(name: str) -> None:
    assert output_weight(build(MORE[name])) is None


def test_shared_out_weights_are_asked_for_logits() -> None:
    model = build(LINEAR["llama"])
    model.get_output_embeddings().weight.ds_id = 3
    assert output_weight(model) is None


@pytest.mark.parametrize("name", [*LINEAR, *MORE])
def test_numbers_and_gradients_are_those_of_unpadded_rows(name: str) -> None:
    """Every token after the second of each row, at temperature 0.7; against the model's own logits, row by row."""
    model = build((LINEAR | MORE)[name])
    ids, mask = pad_sequences(ROWS, 0)
    places = [(r, t) for r, row in enumerate(ROWS) for t in range(1, len(row) - 1)]
    rows, columns = (torch.tensor(axis) for axis in zip(*places, strict=True))
    found, entropy = logprobs_at(model, ids, mask, (rows, columns), ids[rows, columns + 1], 0.7)
    (found.sum() + 0.5 * entropy.sum()).backward()
    actual = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted, total = [], torch.zeros(())
    for row in ROWS:
        logs = (model(torch.tensor([row]), use_cache=False).logits[0].float() / 0.7).log_softmax(-1)
        for t in range(1, len(row) - 1):
            own = -(logs[t].exp() * logs[t]).sum()
            wanted.append((logs[t, row[t + 1]].item(), own.item()))
            total = total + logs[t, row[t + 1]] + 0.5 * own
    total.backward()
    torch.testing.assert_close(torch.stack([found, entropy], 1), torch.tensor(wanted), atol=2e-5, rtol=1e-5)
    for n, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual[n] / scale, expected / scale, atol=2e-5, rtol=0, msg=n)


def test_nothing_to_read_gives_nothing() -> None:
    model = build(LINEAR["gpt_neox"])
    ids, mask = pad_sequences(ROWS, 0)
    none = torch.zeros(0, dtype=torch.long)
    found, _ = logprobs_at(model, ids, mask, (none, none), none)
    assert found.shape == (0,)
