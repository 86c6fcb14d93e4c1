"""The states that are read are those of each row alone, packed or padded, and nothing is computed that nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
)

from rlhf.models.backbone import hidden_states, last_mlp
from rlhf.models.loading import checkpoint_activations
from rlhf.ops.sequences import pad_sequences

Build = Callable[[Any], Any]
WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PLAIN = {
    "gpt_neox": GPTNeoXConfig(vocab_size=64, **WIDTHS),
    "gpt_neox, one after the other": GPTNeoXConfig(vocab_size=64, use_parallel_residual=False, **WIDTHS),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "llama, two queries per key": LlamaConfig(vocab_size=64, num_key_value_heads=1, **WIDTHS),
    "mistral, which sees four tokens": MistralConfig(vocab_size=64, num_key_value_heads=1, sliding_window=4, **WIDTHS),
}
OTHER = {
    "bloom, with a residual": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
    "mixtral, with experts": MixtralConfig(vocab_size=64, num_key_value_heads=1, num_local_experts=2, **WIDTHS),
    "opt, without a part named mlp": OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        word_embed_proj_dim=32,
        dropout=0,
    ),
}
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 20, 21, 22], [15, 16, 17, 18, 19]]
READ = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([4, 3, 6, 5, 2])  # of rows from columns 3, 5 and 2 on


def states_and_gradients(model: Any, states: Tensor) -> list[Tensor]:
    model.zero_grad()
    states.pow(3).sum().backward()
    return [states, *(p.grad.clone() for p in model.base_model.parameters() if p.grad is not None)]


def read(model: Any) -> Tensor:
    return hidden_states(model, *pad_sequences(ROWS, 0), *READ)


def alone(model: Any) -> Tensor:
    """Every row by itself, all of it."""
    rows = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    return torch.stack([rows[row][column] for row, column in zip(*(x.tolist() for x in READ), strict=True)])


@pytest.mark.parametrize("name", PLAIN | OTHER)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_states_and_gradients_are_those_of_each_row_alone(
    name: str, checkpointed: bool, layout: str, from_config: Build
) -> None:
    model = from_config((PLAIN | OTHER)[name])
    theirs = states_and_gradients(model, alone(model))
    if checkpointed:
        checkpoint_activations(model)
    ours = states_and_gradients(model, read(model))
    assert len(ours) == len(theirs) > 10
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, other.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_last_mlp_leaves_out_what_comes_before_the_first_token_read(
    name: str, layout: str, from_config: Build
) -> None:
    model, seen = from_config(PLAIN[name]), []
    last_mlp(model.base_model).register_forward_hook(lambda _, x, y: seen.append(x[0].shape[:2]))  # type: ignore[union-attr]
    read(model)
    assert seen[-1] == {"packed": (1, 4 + 1 + 3), "padded": (3, 5)}[layout]


def test_places_of_any_shape(layout: str, from_config: Build) -> None:
    model, (ids, mask) = from_config(PLAIN["gpt_neox"]), pad_sequences(ROWS, 0)
    columns = torch.tensor([[3, 4], [4, 5], [4, 4]])
    states = hidden_states(model, ids, mask, torch.arange(3).unsqueeze(1), columns)
    rows = torch.arange(3).repeat_interleave(2)
    torch.testing.assert_close(states.flatten(0, 1), hidden_states(model, ids, mask, rows, columns.flatten()))


def test_rows_of_which_nothing_is_read(layout: str, from_config: Build) -> None:
    model, (ids, mask) = from_config(PLAIN["gpt_neox"]), pad_sequences(ROWS, 0)
    one = hidden_states(model, ids, mask, torch.tensor([1]), torch.tensor([5]))
    torch.testing.assert_close(one, read(model)[3:4])
    none = torch.zeros(0, dtype=torch.long)
    assert hidden_states(model, ids, mask, none, none).shape == (0, 32)


def test_no_hook_stays(layout: str, from_config: Build) -> None:
    model = from_config(PLAIN["gpt2"])
    read(model)
    mlp = last_mlp(model.base_model)
    assert mlp is not None
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks


@pytest.mark.parametrize("name", OTHER)
def test_an_mlp_that_is_no_function_of_each_token_alone_is_left_whole(name: str, from_config: Build) -> None:
    assert last_mlp(from_config(OTHER[name]).base_model) is None


def test_an_mlp_that_is_read_everywhere_is_left_alone(layout: str, from_config: Build) -> None:
    model, (ids, mask) = from_config(PLAIN["gpt_neox"]), pad_sequences(ROWS, 0)
    seen: list[tuple[int, ...]] = []
    mlp = last_mlp(model.base_model)
    assert mlp is not None
    mlp.register_forward_hook(lambda *_: seen.append((len(mlp._forward_hooks), len(mlp._forward_pre_hooks))))
    hidden_states(model, ids, mask, torch.arange(3), torch.zeros(3, dtype=torch.long))
    hidden_states(model, ids, mask, torch.arange(3), torch.full((3,), 4))
    assert seen[-2:] == [(1, 0), (2, 1)]
