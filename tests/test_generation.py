from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.generation import choose, sample, uniforms
from rlhf.models.loading import load_causal_lm
from rlhf.ops.sequences import pad_sequences, truncate_after_eos

PAD, NEVER = 10_000, -1
QUERIES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]


@pytest.fixture
def model(sharp_path: str) -> Any:
    return load_causal_lm(sharp_path)


@pytest.fixture(scope="module")
def small_vocabulary() -> Any:
    """A GPT-NeoX over 12 tokens whose generation settings would change every distribution, were they used."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.25,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).eval()
    settings: Any = model.generation_config
    settings.top_k, settings.top_p, settings.temperature, settings.repetition_penalty = 1, 0.1, 5.0, 50.0
    settings.eos_token_id, settings.max_new_tokens, settings.suppress_tokens = 2, 1, [1, 2, 3]
    return model


def draw(model: Any, queries: list[list[int]], seed: int = 0, **settings: Any) -> Tensor:
    settings = {"temperature": 0.7, "eos_id": NEVER, "pad_id": PAD} | settings
    numbers = uniforms(len(queries), settings.pop("max_new_tokens", 12), torch.Generator().manual_seed(seed))
    return sample(model, *pad_sequences(queries, PAD, "left"), numbers, **settings)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@torch.no_grad()
def test_tokens_follow_the_softmax_at_the_temperature(small_vocabulary: Any, temperature: float) -> None:
    """The first token against its distribution, the second against its own given the first; 11 degrees of freedom."""
    query = [3, 1, 4]
    responses = draw(small_vocabulary, [query] * 20_000, max_new_tokens=2, temperature=temperature)

    def logits(prefix: list[int]) -> Tensor:
        return small_vocabulary(torch.tensor([prefix])).logits[0, -1].double()

    first = torch.bincount(responses[:, 0], minlength=12)
    assert chi_square(first, (logits(query) / temperature).softmax(-1)) < 40
    assert chi_square(first, (logits(query) / (temperature + 0.3)).softmax(-1)) > 100
    common = int(first.argmax())
    second = torch.bincount(responses[responses[:, 0] == common, 1], minlength=12)
    assert chi_square(second, (logits([*query, common]) / temperature).softmax(-1)) < 40


@pytest.mark.parametrize("eos_id", [2, 7, 11])
def test_eos_ends_a_row_and_changes_nothing_before_it(small_vocabulary: Any, eos_id: int) -> None:
    queries = [[1, 2, 3], [4], [5, 6]] * 20
    endless = draw(small_vocabulary, queries)
    assert endless.shape == (60, 12)
    assert (endless == eos_id).any()
    assert torch.equal(draw(small_vocabulary, queries, eos_id=eos_id), truncate_after_eos(endless, eos_id, PAD))


def test_sampling_stops_when_all_rows_have_ended(small_vocabulary: Any) -> None:
    queries, eos_id = [[4], [5, 6]], 7
    endless = draw(small_vocabulary, queries, max_new_tokens=60, temperature=2.0)
    ends = (endless == eos_id).long().argmax(1) + 1
    assert (endless == eos_id).any(1).all()
    responses = draw(small_vocabulary, queries, max_new_tokens=60, temperature=2.0, eos_id=eos_id)
    assert responses.shape == (2, ends.max())
    assert ends.min() < ends.max() < 60
    assert (responses != PAD).sum(1).tolist() == ends.tolist()


def test_the_generator_alone_decides(model: Any) -> None:
    first = draw(model, QUERIES, seed=1)
    before = torch.get_rng_state()
    torch.manual_seed(123)
    assert torch.equal(first, draw(model, QUERIES, seed=1))
    assert not torch.equal(first, draw(model, QUERIES, seed=2))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    draw(model, QUERIES)
    assert torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(before)


def test_left_padding_changes_nothing(model: Any) -> None:
    ids, mask = pad_sequences(QUERIES, PAD, "left")
    wide = torch.nn.functional.pad(ids, (20, 0), value=PAD), torch.nn.functional.pad(mask, (20, 0))
    settings: dict[str, Any] = {"temperature": 0.7, "eos_id": NEVER, "pad_id": PAD}
    numbers = uniforms(3, 12, torch.Generator().manual_seed(4))
    tight, padded = (sample(model, *inputs, numbers, **settings) for inputs in ((ids, mask), wide))
    assert torch.equal(tight, padded)


@torch.no_grad()
def test_a_low_temperature_is_greedy(model: Any) -> None:
    """Against one row at a time, without cache or padding."""
    responses = draw(model, QUERIES, temperature=1e-4, max_new_tokens=8)
    for row, query in enumerate(QUERIES):
        tokens = list(query)
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert responses[row].tolist() == tokens[len(query) :]


def test_a_response_depends_on_its_own_row_alone(small_vocabulary: Any) -> None:
    """Not on the rows beside it, and not on when ended rows leave the batch."""
    queries, eos_id = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [2, 2]], 7
    numbers = uniforms(5, 30, torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"temperature": 1.5, "eos_id": eos_id, "pad_id": PAD}
    together = sample(small_vocabulary, *pad_sequences(queries, PAD, "left"), numbers, **settings)
    lengths = (together != PAD).sum(1)
    assert len(set(lengths.tolist())) > 2
    for row, query in enumerate(queries):
        alone = sample(
            small_vocabulary,
            torch.tensor([query]),
            torch.ones(1, len(query)).long(),
            numbers[row : row + 1],
            **settings,
        )
        assert torch.equal(alone[0], together[row, : lengths[row]])


@pytest.mark.parametrize("leaving", [1e-9, 0.5, 1.0])
def test_leaving_earlier_or_later_changes_nothing(
    small_vocabulary: Any, leaving: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [[1, 2, 3], [4], [5, 6]] * 6
    expected = draw(small_vocabulary, queries, eos_id=7, max_new_tokens=25)
    widths: list[int] = []
    handle = small_vocabulary.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("rlhf.generation.LEAVING", leaving)
    assert torch.equal(draw(small_vocabulary, queries, eos_id=7, max_new_tokens=25), expected)
    handle.remove()
    assert (len(set(widths)) == 1) == (leaving == 1.0)


@pytest.mark.parametrize("size", [5, 256, 257, 1000])
def test_choose_follows_the_distribution_whatever_the_size_of_the_vocabulary(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(size, generator=generator)
    tokens = choose(logits.expand(40_000, -1), torch.rand(40_000, generator=generator, dtype=torch.float64))
    assert tokens.min() >= 0
    assert tokens.max() < size
    degrees = size - 1
    statistic = chi_square(torch.bincount(tokens, minlength=size), logits.double().softmax(-1))
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_choose_inverts_the_cumulative_distribution() -> None:
    """At the ends too; a token without probability is never drawn."""
    logits = torch.full((1, 600), -torch.inf)
    logits[0, [3, 300, 555]] = torch.tensor([0.2, 0.5, 0.3]).log()
    for number, token in ((0.0, 3), (0.19, 3), (0.21, 300), (0.69, 300), (0.71, 555), (1 - 2**-53, 555)):
        assert choose(logits, torch.tensor([number], dtype=torch.float64)).item() == token
