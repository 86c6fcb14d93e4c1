from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.models.actor_critic import ActorCritic, Evaluation, join, response_logprobs
from rlhf.models.loading import load_causal_lm
from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.sequences import model_inputs, pad_sequences, token_logprobs

PAD = 10_000
QUERIES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
RESPONSES = [[21, 22], [23, 24, 25, 26], [27]]

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def networks(sharp_path: str, layout: str) -> ActorCritic:
    return ActorCritic(load_causal_lm(sharp_path), ScalarModel.from_policy(sharp_path, seed=0))


@pytest.fixture
def batch() -> Batch:
    """PAD is outside the embedding: a padded position that is fed as such raises an IndexError."""
    return (*pad_sequences(QUERIES, PAD, "left"), *pad_sequences(RESPONSES, PAD, "right"))


def widen(batch: Batch, left: int, right: int) -> Batch:
    queries, query_mask, responses, response_mask = batch
    return (
        pad(queries, (left, 0), value=PAD),
        pad(query_mask, (left, 0)),
        pad(responses, (0, right), value=PAD),
        pad(response_mask, (0, right)),
    )


def real(values: Tensor) -> list[Tensor]:
    return [row[: len(response)] for row, response in zip(values, RESPONSES, strict=True)]


def test_join(batch: Batch) -> None:
    ids, mask = join(*batch)
    assert ids[1].tolist() == [PAD] * 4 + [11, 12, 23, 24, 25, 26]
    assert mask[2].tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@torch.no_grad()
def test_logprobs_are_those_of_a_full_forward_of_each_row(
    networks: ActorCritic, batch: Batch, temperature: float
) -> None:
    logprobs, entropy = response_logprobs(networks.policy, *batch, temperature)
    assert logprobs.shape == entropy.shape == (3, 4)
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        logits = networks.policy(torch.tensor([query + response])).logits[0].double() / temperature
        for t, token in enumerate(response):
            p = logits[len(query) + t - 1].softmax(-1)
            assert logprobs[row, t].item() == pytest.approx(p[token].log().item(), abs=2e-4)
            assert entropy[row, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=2e-4)


@pytest.mark.parametrize(("left", "right"), [(1, 0), (17, 0), (0, 3), (9, 2)])
@torch.no_grad()
def test_padding_changes_nothing(networks: ActorCritic, batch: Batch, left: int, right: int) -> None:
    tight, wide = networks(*batch, 0.7), networks(*widen(batch, left, right), 0.7)
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(
            torch.cat(real(getattr(wide, name))), torch.cat(real(getattr(tight, name))), atol=2e-4, rtol=0
        )


@torch.no_grad()
def test_values_are_of_the_state_before_the_token(networks: ActorCritic, batch: Batch) -> None:
    """Column t reads query + response[:t]; the column after the last token reads the finished response."""
    values = networks(*batch, 1.0).values
    assert values.shape == (3, 4)
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        for t in range(min(len(response) + 1, 4)):
            ids = torch.tensor([query + response[:t]])
            expected = networks.critic.score(ids, torch.ones_like(ids)).item()
            assert values[row, t].item() == pytest.approx(expected, abs=2e-4)


def test_policy_and_critic_share_no_parameters(networks: ActorCritic) -> None:
    policy = {p.data_ptr() for p in networks.policy.parameters()}
    assert policy.isdisjoint(p.data_ptr() for p in networks.critic.parameters())
    assert len(list(networks.parameters())) == sum(
        len(list(part.parameters())) for part in (networks.policy, networks.critic)
    )


def test_the_gradient_of_a_token_reaches_earlier_tokens_only(networks: ActorCritic, batch: Batch) -> None:
    queries, query_mask, responses, response_mask = batch
    embedding: Any = networks.policy.get_input_embeddings()
    embedding.weight.grad = None
    response_logprobs(networks.policy, queries, query_mask, responses, response_mask, 1.0)[0][1, 1].backward()
    touched = set(embedding.weight.grad.abs().sum(-1).nonzero().flatten().tolist())
    assert {11, 12, 23} <= touched
    if embedding.weight is not networks.policy.get_output_embeddings().weight:
        assert touched == {11, 12, 23}


@torch.no_grad()
def test_bfloat16_networks_give_float32_statistics(networks: ActorCritic, batch: Batch) -> None:
    now = networks.bfloat16()(*batch, 0.7)
    assert {x.dtype for x in now} == {torch.float32}


# ---------------------------------------------------------------------------------------------------- the plain pass


def plain(networks: ActorCritic, batch: Batch, temperature: float) -> Evaluation:
    """Padding on the left stays there behind an attention mask, and there are logits of all tokens at all places."""
    queries, _, responses, response_mask = batch
    ids, mask = join(*batch)
    predicting = slice(queries.shape[1] - 1, -1)
    logits = networks.policy(**model_inputs(ids, mask), use_cache=False).logits[:, predicting]
    logprobs, entropy = token_logprobs(logits, responses * response_mask, temperature)
    real = response_mask.bool()
    values = networks.critic(ids, mask)[:, predicting]
    return Evaluation(logprobs.where(real, 0.0), entropy.where(real, 0.0), values)


def gradients(networks: ActorCritic, now: Evaluation) -> dict[str, Tensor]:
    """Of a loss in which every real log-probability, entropy and value has another weight; their sum is not 0.

    It is the gradient of the critic's bias, of which otherwise only rounding would be left.
    """
    networks.zero_grad()
    mask = pad_sequences(RESPONSES, PAD)[1].bool()
    weights = torch.linspace(-1, 2, int(mask.sum()))
    sum((factor * (x[mask] * weights).sum()) for factor, x in zip((1.0, 0.3, 0.5), now, strict=True)).backward()
    return {name: p.grad.clone() for name, p in networks.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_it_equals_the_plain_pass_with_its_gradients(networks: ActorCritic, batch: Batch, temperature: float) -> None:
    with torch.no_grad():  # weights of 0.2 would make these log-probabilities ten times those of a trained model
        for parameter in networks.parameters():
            parameter.mul_(0.5 if parameter.dim() == 2 else 1)
    found, expected = networks(*batch, temperature), plain(networks, batch, temperature)
    mask = batch[3].bool()
    for name in ("logprobs", "entropy", "values"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.shape == other.shape == (3, 4)
        torch.testing.assert_close(one[mask], other[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.logprobs == 0, ~mask)
    ours, theirs = gradients(networks, found), gradients(networks, expected)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= len(list(networks.parameters())) - 1  # the bias of the head, or all of them
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_in_bfloat16_it_is_as_close_to_the_truth_as_the_plain_pass(
    networks: ActorCritic, batch: Batch, how: str, device: str
) -> None:
    """Values and gradients; the truth is the plain pass in float32. bfloat16 has 8 bits.

    The two passes round differently, and by chance either is the closer one.
    """
    truth = plain(networks, batch, 0.7)
    slopes = gradients(networks, truth)
    if how == "weights":
        networks.bfloat16()
    with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
        found, usual = networks(*batch, 0.7), plain(networks, batch, 0.7)
    mask = batch[3].bool()
    for one, other, exact in zip(found, usual, truth, strict=True):
        assert one.dtype == torch.float32
        assert distance(one[mask], exact[mask]) < 4 * distance(other[mask], exact[mask]) + 2**-8
    ours, theirs = gradients(networks, found), gradients(networks, usual)
    for name, exact in slopes.items():
        assert distance(ours[name], exact) < 4 * distance(theirs[name], exact) + 2**-8, name


def distance(x: Tensor, truth: Tensor) -> float:
    """Relative to the size of the truth."""
    return ((x.double() - truth).norm() / truth.norm()).item()
