"""Rows behind one another: which models take them, and that they see nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
)

from rlhf.models import packing
from rlhf.models.packing import ATTENTION, _variable_length, attention, packed, packs
from rlhf.models.probes import backbone_of
from rlhf.ops.sequences import pad_sequences

Build = Callable[[Any], Any]
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
WIDTHS: dict[str, Any] = SMALL | {"num_attention_heads": 2, "intermediate_size": 64}
TAKE = {
    "gpt_neox": GPTNeoXConfig(**WIDTHS),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2),
    "llama, two queries per key": LlamaConfig(num_key_value_heads=1, **WIDTHS),
    "mistral, which sees four tokens": MistralConfig(num_key_value_heads=1, sliding_window=4, **WIDTHS),
    "mixtral, with experts": MixtralConfig(num_key_value_heads=1, num_local_experts=2, **WIDTHS),
}
REFUSE = {
    "bloom, whose attention is its own": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
    "falcon, whose attention calls the kernel itself": FalconConfig(num_attention_heads=2, **SMALL),
    "mamba, whose state goes on": MambaConfig(**SMALL),
}
ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


@pytest.mark.cpu_only("models in float32 are padded on a GPU")
@pytest.mark.parametrize("name", TAKE)
def test_models_that_take_packed_rows(name: str, from_config: Build) -> None:
    assert packs(from_config(TAKE[name]))


@pytest.mark.parametrize("name", REFUSE)
def test_models_that_do_not_are_left_as_they_were(name: str, from_config: Build) -> None:
    model = AutoModelForCausalLM.from_config(REFUSE[name]).eval()
    before = model(torch.tensor([[1, 2, 3]])).logits
    implementation = model.config._attn_implementation
    assert not packs(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


def test_a_model_whose_attention_is_not_sdpa_or_chunked_is_padded(from_config: Build) -> None:
    config = GPTNeoXConfig(**WIDTHS)
    assert not packs(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    chunked = from_config(LlamaConfig(**WIDTHS))
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert not packs(chunked)


def test_weights_shared_out_by_zero3_are_padded(from_config: Build) -> None:
    model = from_config(TAKE["gpt_neox"])
    model.get_input_embeddings().weight.ds_id = 3
    assert not packs(model)


@pytest.mark.cpu_only("models in float32 are padded on a GPU")
@pytest.mark.parametrize("behind", [1, 2, 3])
def test_a_model_in_which_a_little_comes_over_from_the_row_before_is_padded(behind: int, from_config: Build) -> None:
    """Its first layer adds a thousandth of an earlier token, as far `behind` in the sequence, to each."""
    model = from_config(TAKE["llama, two queries per key"])

    def leak(_: Any, __: Any, embedded: Tensor) -> Tensor:
        return embedded + 1e-3 * torch.nn.functional.pad(embedded, (0, 0, behind, 0))[:, :-behind]

    model.get_input_embeddings().register_forward_hook(leak)
    assert not packs(model)


@pytest.mark.cpu_only("models in float32 are padded on a GPU")
def test_the_model_is_probed_once(monkeypatch: pytest.MonkeyPatch, from_config: Build) -> None:
    probed: list[Any] = []
    probe = packing._keeps_rows_apart
    monkeypatch.setattr(packing, "_keeps_rows_apart", lambda model: probed.append(model) or probe(model))
    model = from_config(TAKE["gpt2"])
    assert [packs(model), packs(model), len(probed)] == [True, True, 1]


@pytest.mark.cpu_only("models in float32 are padded on a GPU")
@pytest.mark.parametrize("name", TAKE)
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_that_packs_gives_the_same_as_before_without(name: str, padded: bool, from_config: Build) -> None:
    """With a cache as without one, with padding and without."""
    model = from_config(TAKE[name])
    ids, mask = pad_sequences(ROWS if padded else [row[:2] for row in ROWS], 0, "left")
    before = model(input_ids=ids, attention_mask=mask).logits
    packs(model)
    assert model.config._attn_implementation == ATTENTION
    out = model(input_ids=ids, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(out.logits, before, atol=1e-5, rtol=1e-5)  # keys and values lie elsewhere in a cache
    token, longer = torch.full((3, 1), 4), torch.nn.functional.pad(mask, (0, 1), value=1)
    step = model(input_ids=token, attention_mask=longer, past_key_values=out.past_key_values).logits
    whole = model(input_ids=torch.cat([ids, token], 1), attention_mask=longer).logits[:, -1:]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("name", TAKE)
@torch.no_grad()
def test_packed_rows_in_bfloat16_are_those_of_each_row_alone(
    name: str, how: str, from_config: Build, device: str
) -> None:
    """Up to rounding; on a GPU this is the kernel for rows of different lengths, which does not take float32."""
    model = from_config(TAKE[name])
    model = model.bfloat16() if how == "weights" else model
    backbone = backbone_of(model)
    with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
        alone = [backbone(torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ROWS]
        assert packs(model)
        inputs = packed(*pad_sequences(ROWS, 0), torch.tensor([0, 0, 0]))
        together = backbone(**inputs, use_cache=False).last_hidden_state[0]
    expected = torch.cat(alone).float()
    assert (together.float() - expected).norm() < 0.03 * expected.norm()


def test_an_export_says_nothing_of_it(tmp_path: Any, from_config: Build) -> None:
    model = from_config(TAKE["gpt_neox"])
    packs(model)
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_inputs_hold_real_tokens_only(side: Any) -> None:
    inputs = packed(*pad_sequences(ROWS, 99, side), torch.tensor([3, 0, 2]))
    assert inputs["packing"][:2] == ([5, 2, 3], [3, 0, 2])
    assert inputs["packing"].offsets.tolist() == [0, 5, 7, 10]
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]
    assert inputs["attention_mask"].tolist() == [[[[True] * 10]]]


@pytest.mark.cpu_only("models in float32 are padded on a GPU")
@pytest.mark.parametrize("name", TAKE)
def test_the_last_layer_attends_from_the_first_token_read(
    name: str, monkeypatch: pytest.MonkeyPatch, from_config: Build
) -> None:
    from transformers.integrations import sdpa_attention

    model, queries = from_config(TAKE[name]), []
    assert packs(model)
    plain = sdpa_attention.sdpa_attention_forward

    def counted(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query.shape[2])
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    model.base_model(**packed(*pad_sequences(ROWS, 0), torch.tensor([3, 0, 2])), use_cache=False)
    assert queries == [5, 2, 3, 2, 2, 1]


def variable_length_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Does what `torch.nn.attention.varlen.varlen_attn` says it does, `(N, heads, d)`, by plain products."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert query.dtype == key.dtype == value.dtype
    assert enable_gqa or query.shape[1] == key.shape[1]
    rows = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        place = torch.arange(end - start)
        behind = place.unsqueeze(1) - place
        left, right = (len(place) if side == -1 else side for side in window_size)
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        seen = (behind <= left) & (behind >= -right)
        rows.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.cpu_only("a GPU has the kernel")
@pytest.mark.parametrize("name", TAKE)
def test_a_gpus_kernel_is_given_what_it_takes(name: str, monkeypatch: pytest.MonkeyPatch, from_config: Build) -> None:
    """The kernel runs on GPUs only: one of the same signature stands in for it."""
    model = from_config(TAKE[name])
    ids, mask = pad_sequences([[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]], 99, "right")
    inputs = packed(ids, mask, first=torch.zeros(3, dtype=torch.long))
    assert packs(model)
    row_by_row = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", variable_length_attention)
    calls = []

    def at_once(module: Any, query: Any, key: Any, value: Any, mask: Any, packing: Any, **more: Any) -> Any:
        calls.append(module)
        return _variable_length(query, key, value, packing, more["scaling"], more.get("sliding_window")), None

    AttentionInterface.register(ATTENTION, at_once)
    try:
        together = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
    finally:
        AttentionInterface.register(ATTENTION, attention)
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(together, row_by_row, atol=1e-5, rtol=1e-5)
