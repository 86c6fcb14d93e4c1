from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, GPTNeoXForCausalLM

from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm
from rlhf.models.saving import save_pretrained
from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.sequences import last_real_token, pad_sequences

PAD = 10_000
SEQUENCES = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16]]


@pytest.fixture
def model(sharp_path: str, layout: str) -> ScalarModel:
    return ScalarModel.from_policy(sharp_path, seed=3)


def test_head_is_initialised_as_in_the_paper(tmp_path: Path) -> None:
    """Weights N(0, 1 / sqrt(d + 1)), bias 0 (D17), on a width that gives enough samples."""
    d = 8192
    GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=8, hidden_size=d, num_hidden_layers=0, num_attention_heads=64, intermediate_size=8)
    ).save_pretrained(tmp_path)
    model = ScalarModel.from_policy(str(tmp_path), seed=1)
    standard = model.model.score.weight.detach().flatten().double() * math.sqrt(d + 1)
    assert standard.shape == (d,)
    assert standard.mean().item() == pytest.approx(0, abs=0.05)
    assert standard.std().item() == pytest.approx(1, abs=0.03)
    assert (standard**4).mean().item() == pytest.approx(3, abs=0.3)
    assert model.bias.item() == 0


def test_head_scale_is_exactly_that_of_d_plus_one(model: ScalarModel) -> None:
    expected = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) / math.sqrt(33)
    torch.testing.assert_close(model.model.score.weight.detach(), expected)


def test_head_depends_on_the_given_seed_only(sharp_path: str, model: ScalarModel) -> None:
    torch.manual_seed(99)
    same, other = (ScalarModel.from_policy(sharp_path, seed=s) for s in (3, 4))
    assert torch.equal(same.model.score.weight, model.model.score.weight)
    assert not torch.allclose(other.model.score.weight, model.model.score.weight)


def test_backbone_is_that_of_the_policy(sharp_path: str, model: ScalarModel) -> None:
    theirs = load_causal_lm(sharp_path).base_model.state_dict()
    ours = model.model.base_model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_score_does_not_depend_on_padding(model: ScalarModel, side: str) -> None:
    ids, mask = pad_sequences(SEQUENCES, PAD, side)
    alone = [model.score(torch.tensor([s]), torch.ones(1, len(s), dtype=torch.long)).item() for s in SEQUENCES]
    assert model.score(ids, mask).tolist() == pytest.approx(alone, abs=2e-4)
    assert max(alone) - min(alone) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_equals_the_plain_pass_with_its_gradients(model: ScalarModel, side: str) -> None:
    """Which leaves the padding where it is, behind an attention mask, and reads every token."""
    ids, mask = pad_sequences(SEQUENCES, PAD, side)
    found = []
    for scores in (model.score(ids, mask), model(ids, mask)[torch.arange(4), last_real_token(mask)]):
        model.zero_grad()
        (scores * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        found.append((scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (ours, our_slopes), (theirs, their_slopes) = found
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert our_slopes.keys() == their_slopes.keys() == {name for name, _ in model.named_parameters()}
    for name, slope in our_slopes.items():
        torch.testing.assert_close(slope, their_slopes[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_difference_between_the_sides_is_measured(model: ScalarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a sound model; a model that does not look at the attention mask is found out."""
    ids, mask = pad_sequences(SEQUENCES, PAD)
    assert model.padding_side_difference(ids, mask) < 1e-4
    forward = model.model.base_model.forward

    def blind(attention_mask: Any = None, **inputs: Any) -> Any:
        return forward(attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **inputs)

    monkeypatch.setattr(model.model.base_model, "forward", blind)
    assert model.padding_side_difference(ids, mask) > 0.01


@torch.no_grad()
def test_every_token_has_the_score_of_its_prefix(model: ScalarModel) -> None:
    ids = torch.tensor([SEQUENCES[0]])
    values = model(ids, torch.ones_like(ids))
    prefixes = [model.score(ids[:, :n], torch.ones_like(ids[:, :n])).item() for n in range(1, 7)]
    assert values[0].tolist() == pytest.approx(prefixes, abs=2e-4)


@torch.no_grad()
def test_values_are_float32_and_the_head_is_not_rounded(model: ScalarModel, device: str) -> None:
    """In a bfloat16 model under autocast a head in bfloat16 would give multiples of 2^-8."""
    ids = torch.tensor([SEQUENCES[0]])
    model.model.bfloat16()
    with torch.autocast(device, torch.bfloat16):
        values = model(ids, torch.ones_like(ids))
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


@pytest.mark.parametrize("bias", [0.0, 1.75, -0.3])
@torch.no_grad()
def test_export_loads_in_plain_transformers(model: ScalarModel, tokenizer: Any, tmp_path: Path, bias: float) -> None:
    model.bias.fill_(bias)
    model.save(tmp_path, tokenizer)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids, mask = pad_sequences(SEQUENCES, tokenizer.pad_token_id)
    theirs = plain(input_ids=ids, attention_mask=mask).logits.squeeze(-1) - plain.config.reward_shift
    assert plain.config.reward_shift == pytest.approx(-bias)
    torch.testing.assert_close(theirs, model.score(ids, mask), atol=2e-4, rtol=0)


@torch.no_grad()
def test_export_loads_here(model: ScalarModel, tokenizer: Any, tmp_path: Path) -> None:
    model.bias.fill_(0.625)
    model.save(tmp_path, tokenizer)
    again = ScalarModel.from_pretrained(str(tmp_path), "model.reward_path")
    ids, mask = pad_sequences(SEQUENCES, PAD)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(again.score(ids, mask), model.score(ids, mask), atol=1e-5, rtol=1e-5)
    assert ScalarModel.from_policy(str(tmp_path), seed=0).bias.item() == 0


def test_a_language_model_is_no_reward_model(sharp_path: str) -> None:
    with pytest.raises(UserError, match=r"model\.reward_path.*not a reward model.*reward stage"):
        ScalarModel.from_pretrained(sharp_path, "model.reward_path")
    with pytest.raises(UserError, match="no linear head named `score`"):
        ScalarModel(load_causal_lm(sharp_path))


def test_a_reward_model_is_no_policy(model: ScalarModel, tokenizer: Any, tmp_path: Path) -> None:
    """Else its missing language-model head would silently be random."""
    model.save(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"model\.model_path"):
        load_causal_lm(str(tmp_path), "model.model_path")


def test_a_classifier_with_several_labels_is_refused(sharp_path: str, tokenizer: Any, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(sharp_path, num_labels=3)
    save_pretrained(classifier, tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"model\.reward_path"):
        ScalarModel.from_pretrained(str(tmp_path), "model.reward_path")
