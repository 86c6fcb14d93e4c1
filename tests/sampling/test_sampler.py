from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm
from rlhf.ops.sequences import pad_sequences, truncate_after_eos
from rlhf.sampling import sampler
from rlhf.sampling.paths import reader_for
from rlhf.sampling.sampler import BLOCK, Decoding, _first_above, choose, sample, uniforms

PAD, NEVER = 10_000, -1
QUERIES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]


@pytest.fixture
def model(sharp_path: str, layout: str) -> Any:
    return load_causal_lm(sharp_path)


@pytest.fixture(scope="module")
def small_vocabulary(device: str) -> Any:
    """A GPT-NeoX over 12 tokens whose generation settings would change every distribution, were they used."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.25,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).eval().to(device)  # type: ignore[arg-type]
    settings: Any = model.generation_config
    settings.top_k, settings.top_p, settings.temperature, settings.repetition_penalty = 1, 0.1, 5.0, 50.0
    settings.eos_token_id, settings.max_new_tokens, settings.suppress_tokens = 2, 1, [1, 2, 3]
    return model


def draw(model: Any, queries: list[list[int]], seed: int = 0, **settings: Any) -> Tensor:
    numbers = uniforms(len(queries), settings.pop("max_new_tokens", 12), torch.Generator().manual_seed(seed))
    numbers = numbers.to(model.device)
    return sample(
        model, *pad_sequences(queries, PAD, "left"), numbers, Decoding(0.7, (NEVER,), PAD)._replace(**settings)
    )


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
    assert torch.equal(draw(small_vocabulary, queries, eos_ids=(eos_id,)), truncate_after_eos(endless, (eos_id,), PAD))


def test_sampling_stops_when_all_rows_have_ended(small_vocabulary: Any) -> None:
    queries, eos_id = [[4], [5, 6]], 7
    endless = draw(small_vocabulary, queries, max_new_tokens=60, temperature=2.0)
    ends = (endless == eos_id).long().argmax(1) + 1
    assert (endless == eos_id).any(1).all()
    responses = draw(small_vocabulary, queries, max_new_tokens=60, temperature=2.0, eos_ids=(eos_id,))
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
    numbers = uniforms(3, 12, torch.Generator().manual_seed(4)).to(model.device)
    tight, padded = (sample(model, *inputs, numbers, Decoding(0.7, (NEVER,), PAD)) for inputs in ((ids, mask), wide))
    assert torch.equal(tight, padded)


MANY = [[n % 12, (5 * n) % 12, (7 * n + 1) % 12][: 1 + n % 3] for n in range(24)]


def one_by_one(model: Any, queries: list[list[int]], numbers: Tensor, decoding: Decoding) -> Tensor:
    """Each row in a batch of its own."""
    width = numbers.shape[1]
    responses = torch.full((len(queries), width), PAD)
    for row, query in enumerate(queries):
        alone = sample(model, *pad_sequences([query], PAD), numbers[row : row + 1], decoding)
        responses[row, : alone.shape[1]] = alone
    return responses


@pytest.mark.parametrize("leaving", [0.0, 0.25, 0.9, 1.0])
def test_a_response_depends_on_its_own_row_alone(
    small_vocabulary: Any, leaving: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the rows beside it, nor on when those that have ended leave the batch: at once, late, or never."""
    monkeypatch.setattr(sampler, "LEAVING", leaving)
    numbers = uniforms(len(MANY), 16, torch.Generator().manual_seed(6))  # none within 5e-4 of another token
    numbers = numbers.to(small_vocabulary.device)
    decoding = Decoding(1.0, (7,), PAD)
    alone = one_by_one(small_vocabulary, MANY, numbers, decoding)
    lengths = (alone != PAD).sum(1)
    assert lengths.unique().numel() > 5
    together = sample(small_vocabulary, *pad_sequences(MANY, PAD, "left"), numbers, decoding)
    assert torch.equal(together, alone[:, : together.shape[1]])
    assert together.shape[1] == lengths.max()


def test_rows_that_have_ended_leave_the_batch(small_vocabulary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    chosen = sampler.choose
    monkeypatch.setattr(sampler, "LOOK_EVERY", 1)
    monkeypatch.setattr(sampler, "choose", lambda logits, u: rows.append(len(logits)) or chosen(logits, u))
    responses = draw(small_vocabulary, MANY, max_new_tokens=40, temperature=1.0, eos_ids=(7,))
    lengths = (responses != PAD).sum(1)
    assert rows == sorted(rows, reverse=True)
    assert len(rows) == lengths.max()
    alive = [int((lengths > step).sum()) for step in range(len(rows))]
    assert all(kept >= left > 0.75 * kept for kept, left in zip(rows, alive, strict=True))
    assert len(set(rows)) > 4


@pytest.mark.parametrize(("kind", "temperature"), [("mistral", 1.0), ("gemma2", 3.0)])
def test_a_sliding_window_sees_what_it_sees_without_a_cache(kind: str, temperature: float) -> None:
    """Windows of 4 tokens under queries of up to 9, rows that leave; against one row at a time without cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        kind, vocab_size=12, sliding_window=4, head_dim=8, intermediate_size=32, initializer_range=0.4,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, **shape,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).eval()
    queries = [[(3 * n + k) % 12 for k in range(1 + (4 * n) % 9)] for n in range(12)]
    numbers = uniforms(len(queries), 14, torch.Generator().manual_seed(2)).to(model.device)
    together = sample(model, *pad_sequences(queries, PAD, "left"), numbers, Decoding(temperature, (7,), PAD))
    lengths = (together != PAD).sum(1)
    assert lengths.unique().numel() > 3
    for row, query in enumerate(queries):
        tokens = list(query)
        for step in range(int(lengths[row])):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[:, -1]
            tokens.append(int(choose(logits / temperature, numbers[row : row + 1, step])))
        assert together[row, : lengths[row]].tolist() == tokens[len(query) :]


@pytest.mark.parametrize("vocabulary", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3, 3 * BLOCK])
def test_a_draw_follows_the_distribution_over_several_blocks(vocabulary: int) -> None:
    """Chi-square over groups of tokens that expect 50 draws or more; its mean is the number of groups."""
    random = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(vocabulary, generator=random)
    rows = 40_000
    tokens = choose(logits.expand(rows, -1), uniforms(rows, 1, random).squeeze(1).to(logits.device))
    assert tokens.shape == (rows,)
    expected = rows * torch.softmax(logits.double(), -1)
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    order = expected.argsort()
    groups = (expected[order].cumsum(0) / 50).long()
    size = int(groups.max()) + 1
    grouped, wanted = (torch.zeros(size).double().index_add(0, groups, x[order]) for x in (counts, expected))
    grouped, wanted = grouped[wanted > 10], wanted[wanted > 10]
    degrees = len(wanted) - 1
    assert ((grouped - wanted) ** 2 / wanted).sum() <= degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("vocabulary", [5, BLOCK, 2 * BLOCK + 9, 4 * BLOCK])
@pytest.mark.parametrize("seed", range(3))
def test_a_draw_inverts_the_cumulative_distribution(vocabulary: int, seed: int) -> None:
    """Against numpy in float64; a token whose border lies within rounding of the number may be its neighbour."""
    rng = np.random.default_rng(seed)
    logits, numbers = 3 * rng.normal(size=(200, vocabulary)).astype(np.float32), rng.random(200)
    tokens = choose(torch.tensor(logits), torch.tensor(numbers)).numpy()
    weights = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64))
    ends = weights.cumsum(1) / weights.sum(1, keepdims=True)
    rows = np.arange(200)
    assert (ends[rows, tokens] > numbers - 1e-6).all()
    assert (np.where(tokens > 0, ends[rows, tokens - 1], 0) <= numbers + 1e-6).all()


@pytest.mark.parametrize("vocabulary", [7, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("number", [0.0, 2.0**-53, 0.5, 1 - 2.0**-40, 1 - 2.0**-53])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_tokens_of_probability_zero_are_never_drawn(vocabulary: int, number: float, precision: torch.dtype) -> None:
    """At the beginning, in the middle, at the end, and whole blocks of them; one token, or many, have all of it."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        possible = rng.random(vocabulary) < rng.choice([0.001, 0.02, 0.5])
        possible[rng.integers(vocabulary)] = True
        logits = torch.tensor(np.where(possible, rng.normal(size=vocabulary) * 5, -np.inf)).float()
        token = int(choose(logits.unsqueeze(0), torch.tensor([number], dtype=precision)))
        assert possible[token], (seed, token)
        if number == 0:
            assert token == possible.argmax()


@pytest.mark.parametrize(("target", "column"), [(0.0, 0), (1.0, 2), (1.5, 2), (2.0, 3), (2.9, 3), (3.0, 3)])
def test_a_column_without_weight_is_skipped_though_its_sum_has_rounded_up(target: float, column: int) -> None:
    weights, sums = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.1, 2.0, 2.9, 3.0]])
    assert _first_above(sums, torch.tensor([[target]]), weights).item() == column


def test_draws_in_float32_are_those_in_float64_but_for_rounding() -> None:
    random = torch.Generator().manual_seed(0)
    logits, numbers = 2 * torch.randn(2000, 3 * BLOCK + 5, generator=random), torch.rand(2000, generator=random)
    assert (choose(logits, numbers) != choose(logits, numbers.double())).float().mean() < 0.01


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 4])
def test_a_certain_token_is_always_drawn(place: int) -> None:
    logits = torch.full((1, 2 * BLOCK + 5), -1e30)
    logits[0, place] = 1e30
    for number in (0.0, 0.3, 1 - 2.0**-53):
        assert choose(logits, torch.tensor([number], dtype=torch.float64)).item() == place


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("steps", [3, 8, 12])
@pytest.mark.parametrize("probed", [False, True])
def test_logits_that_are_no_distribution_are_refused(
    small_vocabulary: Any, wrong: float, steps: int, probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a look comes at every eighth step only, and whether or not the model was right when it was probed."""
    monkeypatch.setattr(sampler, "LOOKS", {})
    model = copy.deepcopy(small_vocabulary)
    if probed:
        reader_for(model)
    columns = slice(None) if wrong == -torch.inf else 5

    def break_logits(_: Any, __: Any, logits: Tensor) -> None:
        logits[..., columns] = wrong

    model.get_output_embeddings().register_forward_hook(break_logits)
    with pytest.raises(UserError, match=r"logits of .* are NaN or infinite: its weights are broken"):
        draw(model, [[5, 6], [7]], max_new_tokens=steps)


@torch.no_grad()
def test_a_low_temperature_is_greedy(model: Any) -> None:
    """Against one row at a time, without cache or padding."""
    responses = draw(model, QUERIES, temperature=1e-4, max_new_tokens=8)
    for row, query in enumerate(QUERIES):
        tokens = list(query)
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert responses[row].tolist() == tokens[len(query) :]
