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
def networks(sharp_path: str) -> ActorCritic:
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


def plainly(networks: ActorCritic, batch: Batch, temperature: float) -> Evaluation:
    """With left padding, an attention mask, and the logits of all positions."""
    queries, _, responses, response_mask = batch
    ids, mask = join(*batch)
    logits = networks.policy(**model_inputs(ids, mask), use_cache=False).logits
    start, end = queries.shape[1] - 1, ids.shape[1] - 1
    logprobs, entropy = token_logprobs(logits[:, start:end], responses * response_mask, temperature)
    return Evaluation(logprobs, entropy, networks.critic(ids, mask)[:, start:end])


def read(now: Evaluation) -> Tensor:
    """Log-probabilities and entropies of the real tokens, and the values of their states."""
    return torch.stack([torch.cat(real(x)) for x in now])


def test_the_fast_path_is_the_plain_one(networks: ActorCritic, batch: Batch) -> None:
    """In values, and in the gradient of every parameter."""
    found = {}
    for name, evaluate in (("fast", networks), ("plain", lambda *b: plainly(networks, b[:4], b[4]))):
        numbers = read(evaluate(*batch, 0.7))
        networks.zero_grad()
        (numbers * torch.linspace(-1, 1, numbers.numel()).view_as(numbers)).sum().backward()
        found[name] = numbers, {n: p.grad.clone() for n, p in networks.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["fast"][0], found["plain"][0], atol=1e-4, rtol=1e-5)
    assert found["fast"][1].keys() == found["plain"][1].keys()
    for name, expected in found["plain"][1].items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found["fast"][1][name] / scale, expected / scale, atol=1e-4, rtol=0, msg=name)


@torch.no_grad()
def test_under_autocast_the_fast_path_is_the_plain_one_up_to_rounding(networks: ActorCritic, batch: Batch) -> None:
    exact = read(networks(*batch, 0.7))
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = read(networks(*batch, 0.7)), read(plainly(networks, batch, 0.7))
    rounding = (plain - exact).abs().max()
    assert rounding > 0
    assert (fast - exact).abs().max() < 3 * rounding
