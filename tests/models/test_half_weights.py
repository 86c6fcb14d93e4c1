"""Frozen models keep in half precision what autocast alone reads, and give the same numbers to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

from rlhf.models.actor_critic import response_logprobs
from rlhf.models.frozen import FrozenModel
from rlhf.models.half_weights import keep_half
from rlhf.models.scalar_model import ScalarModel

Build = Callable[[Any], Any]
WIDTHS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
LLAMA = "model.layers.0."
CONFIGS: dict[
    str, tuple[Any, set[str], set[str]]
] = {  # with some of the weights that become half, and some that do not
    "gpt_neox": (
        GPTNeoXConfig(**WIDTHS),
        {"gpt_neox.layers.0.attention.query_key_value.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"},
        {"gpt_neox.embed_in.weight", "gpt_neox.layers.0.input_layernorm.weight", "gpt_neox.final_layer_norm.bias"},
    ),
    "llama": (
        LlamaConfig(**WIDTHS),
        {f"{LLAMA}self_attn.q_proj.weight", f"{LLAMA}mlp.down_proj.weight"},
        {"model.embed_tokens.weight", f"{LLAMA}input_layernorm.weight"},
    ),
    "llama, tied": (
        LlamaConfig(tie_word_embeddings=True, **WIDTHS),
        {f"{LLAMA}self_attn.q_proj.weight"},
        {"model.embed_tokens.weight"},
    ),
    "gpt2, whose matrices are no linear layers": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
        {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.bias"},
        {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"},
    ),
    "mixtral, with experts": (
        MixtralConfig(num_local_experts=2, num_key_value_heads=1, **WIDTHS),
        {f"{LLAMA}self_attn.q_proj.weight"},
        {"model.embed_tokens.weight"},
    ),
}


@pytest.fixture
def batch(device: str) -> tuple[Tensor, ...]:
    """Queries and responses with their masks: longer than those of the self-test, some with padding."""
    queries, responses = (torch.randint(0, 64, (4, n), generator=torch.Generator().manual_seed(n)) for n in (9, 7))
    query_mask, response_mask = torch.ones_like(queries), torch.ones_like(responses).bool()
    query_mask[0, :4], response_mask[1, 2:] = 0, False
    return queries, query_mask, responses, response_mask


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_the_same_to_the_last_bit(
    name: str, from_config: Build, batch: tuple[Tensor, ...], device: str
) -> None:
    config, half, whole = CONFIGS[name]
    model = from_config(config)

    def logprobs() -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return torch.stack(response_logprobs(model, *batch, 0.7))

    FrozenModel(model)
    expected = logprobs()
    keep_half(model, torch.bfloat16, lambda i, m: torch.stack(response_logprobs(model, i, m, i, m > 0, 1.0)))
    assert torch.equal(logprobs(), expected)
    found = dtypes(model)
    assert {found[part] for part in half} == {torch.bfloat16}
    assert {found[part] for part in whole} == {torch.float32}
    if name in ("gpt_neox", "llama"):  # all linear layers, the output layer included, and nothing else
        linear = {f"{path}.{key}" for path, m in model.named_modules() if isinstance(m, nn.Linear) for key in dtypes(m)}
        assert {part for part, dtype in found.items() if dtype == torch.bfloat16} == linear


@pytest.mark.parametrize("name", CONFIGS)
def test_rewards_are_the_same_to_the_last_bit(name: str, batch: tuple[Tensor, ...], device: str) -> None:
    config, half, _ = CONFIGS[name]
    config.num_labels = 1
    model = ScalarModel(AutoModelForSequenceClassification.from_config(config)).to(device)
    ids, mask = torch.cat([batch[0], batch[2]], 1), torch.cat([batch[1], batch[3]], 1)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([model.score(ids, mask), model.padding_side_difference(ids, mask).view(1)])

    def rewards() -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            return forward(ids, mask)

    FrozenModel(model)
    expected = rewards()
    keep_half(model, torch.bfloat16, forward)
    assert torch.equal(rewards(), expected)
    found = dtypes(model)
    assert {found[f"model.{part}"] for part in half} == {torch.bfloat16}
    assert model.head_weight.dtype == model.bias.dtype == torch.float32


class Curious(nn.Linear):
    """Looks at the precision of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.weight.dtype == torch.float32)


class Strict(nn.Linear):
    """Takes inputs of the precision of its weight only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            raise TypeError(f"{x.dtype} and {self.weight.dtype}")
        return super().forward(x)


class Bag(nn.Module):
    def __init__(self, layer: type[nn.Linear]) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(4, 8), layer(8, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.layer(self.embedding(ids))


@pytest.mark.parametrize("layer", [nn.Linear, Curious, Strict])
def test_a_model_whose_numbers_would_change_is_left_as_it_was(layer: type[nn.Linear], device: str) -> None:
    model = Bag(layer).to(device)
    FrozenModel(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    keep_half(model, torch.bfloat16, model)
    found = dtypes(model)
    assert found.pop("embedding.weight") == torch.float32
    assert set(found.values()) == {torch.bfloat16 if layer is nn.Linear else torch.float32}
    if layer is not nn.Linear:
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_weight_that_is_read_in_another_way_too_stays(device: str) -> None:
    class Norms(Bag):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return super().forward(ids, mask) + self.layer.weight[0].norm()

    class Unused(Bag):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return F.linear(self.embedding(ids), self.layer.weight.T)  # a view alone reads nothing

    for kind, expected in ((Norms, torch.float32), (Unused, torch.bfloat16)):
        model = kind(nn.Linear).to(device)
        FrozenModel(model)
        keep_half(model, torch.bfloat16, model)
        assert model.layer.weight.dtype == expected
        assert (model.layer.bias.dtype == torch.bfloat16) == (kind is Norms)  # the other one is never read
