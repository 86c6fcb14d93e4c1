"""Log-probabilities from hidden states, for output layers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.models import output_layer
from rlhf.models.output_layer import logprobs_at, output_weight
from rlhf.ops.sequences import pad_sequences

PAD, VOCABULARY = 10_000, 300
SEQUENCES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PLAIN = {"gpt_neox": {}, "gpt2": {"n_inner": 64}, "llama": {}, "qwen2": {"tie_word_embeddings": True}, "mistral": {}}
# A bias, soft-capping, a factor behind the layer, and a divisor behind it.
OTHERS: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8, "n_inner": 64},
    "phi": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


def build(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A small model, in evaluation mode, whose context matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPE | (PLAIN | OTHERS)[kind] | {"initializer_range": 0.2} | settings
    if kind not in ("gpt_neox", "gpt2", "gptj"):
        shape["num_key_value_heads"] = 2
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=0, eos_token_id=0, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def batch() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Sequences, and every place that predicts a token of them."""
    ids, mask = pad_sequences(SEQUENCES, PAD)
    places = mask[:, 1:].nonzero(as_tuple=True)
    return ids, mask, places, ids[:, 1:][places]


def expected(model: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """One row at a time, its plain logits in float64."""
    logprobs, entropy = [], []
    for tokens in SEQUENCES:
        logs = torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].double() / temperature, -1)
        logprobs.append(logs.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1))
        entropy.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(logprobs), torch.cat(entropy)


@pytest.mark.parametrize("kind", [*PLAIN, *OTHERS])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_every_kind_of_output_layer_gives_the_plain_numbers(kind: str, temperature: float, layout: str) -> None:
    """And their gradients, in every parameter."""
    model = build(kind)
    with torch.no_grad():
        layer = model.get_output_embeddings()
        if layer.bias is not None:
            layer.bias.normal_(generator=torch.Generator().manual_seed(0))
    ours, theirs = logprobs_at(model, *batch(), temperature), expected(model, temperature)
    found = []
    for logprobs, entropy in (ours, theirs):
        model.zero_grad()
        (logprobs.mean() + 0.3 * entropy.mean()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)
    assert found[0].keys() == found[1].keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_layer_is_read_without_logits(kind: str) -> None:
    model = build(kind)
    assert output_weight(model) is model.get_output_embeddings().weight


@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_layer_with_more_to_it_is_asked_for_logits(kind: str, initializer_range: float) -> None:
    """Also when a new model's bias is 0 and its logits are so small that no cap reaches them: training changes that."""
    assert output_weight(build(kind, initializer_range=initializer_range)) is None


def test_a_model_that_changes_its_states_before_the_layer_is_asked_for_logits() -> None:
    """As types do that scale or project them there."""
    model = build("llama")
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0] / 4,))
    assert output_weight(model) is None
    for one, other in zip(logprobs_at(model, *batch()), expected(model, 1.0), strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)


def test_the_model_is_probed_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Any] = []
    probe = output_layer._is_plain
    monkeypatch.setattr(output_layer, "_is_plain", lambda *args: probed.append(args) or probe(*args))
    model = build("llama")
    before = model(torch.tensor([[1, 2, 3]])).logits
    for _ in range(2):
        output_weight(model)
    assert len(probed) == 1
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)
    assert not model.get_output_embeddings()._forward_hooks


def test_weights_shared_out_by_zero3_are_asked_for_logits() -> None:
    model = build("llama")
    model.get_output_embeddings().weight.ds_id = 3
    assert output_weight(model) is None
    for one, other in zip(logprobs_at(model, *batch(), 0.7), expected(model, 0.7), strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_only_the_columns_that_are_read_go_through_the_output_layer(kind: str) -> None:
    model, seen = build(kind), []
    output_weight(model)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    ids, mask, places, tokens = batch()
    late = places[1] >= 2
    logprobs_at(model, ids, mask, (places[0][late], places[1][late]), tokens[late])
    assert seen == ([] if kind == "llama" else [(3, 3, 32)])


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_nothing_to_read_gives_nothing(kind: str) -> None:
    model = build(kind)
    ids, mask, places, tokens = batch()
    none = places[0] < 0
    logprobs, entropy = logprobs_at(model, ids, mask, (places[0][none], places[1][none]), tokens[none])
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_under_autocast_only_bfloat16_separates_it_from_the_plain_logits(kind: str, device: str) -> None:
    model = build(kind, initializer_range=0.1)
    exact = expected(model, 0.7)
    with torch.autocast(device, torch.bfloat16):
        found = logprobs_at(model, *batch(), 0.7)
        plain = expected(model, 0.7)
    for one, other, truth in zip(found, plain, exact, strict=True):
        assert one.dtype == torch.float32
        error, usual = (one - truth).abs().max(), (other - truth).abs().max()
        assert error < 4 * usual + 1e-3  # by chance either is the closer one


def test_an_output_layer_that_is_no_matrix_is_asked_for_logits() -> None:
    model = build("llama")
    layer = model.get_output_embeddings()
    model.set_output_embeddings(nn.Sequential(layer))
    assert output_weight(model) is None
    for one, other in zip(logprobs_at(model, *batch(), 0.7), expected(model, 0.7), strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)
