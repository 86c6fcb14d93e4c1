"""What a rollout depends on, and what it must not depend on (D12, D29, D33)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.errors import UserError
from rlhf.models.actor_critic import response_logprobs
from rlhf.models.half_weights import CASTS
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings
from rlhf.sampling.grouping import groups
from rlhf.sampling.responses import Drawn
from rlhf.sampling.rollout import Rollout

Make = Callable[..., Any]
SETTINGS = PPOSettings(response_length=8, ppo_epochs=1)


class OnRank(PPOModule):
    """Thinks that it is some process of several."""

    rank = 0

    @property
    def global_rank(self) -> int:
        return self.rank


@pytest.fixture
def fitted(model_path: str, reward_path: str, trainer: Make, rollout_data: Make, batch_of: Make) -> Make:
    """A module after one update, and a batch of prompts to answer."""

    def fitted(kind: type[PPOModule], **settings: Any) -> tuple[Any, dict[str, Any]]:
        module, data = kind(model_path, reward_path, ppo=SETTINGS), rollout_data()
        trainer(limit_val_batches=0, **settings).fit(module, data)
        module.to(module.trainer.strategy.root_device)  # Lightning leaves it on the CPU
        batch = move_data_to_device(batch_of(data, "train", [0, 1, 2, 3]), module.device)
        return module, {**batch, "chunk": 4}

    return fitted


def test_every_update_and_every_rank_samples_by_a_seed_of_its_own(fitted: Make) -> None:
    module, batch = fitted(OnRank)

    def responses(update: int, rank: int) -> Tensor:
        module.rank = rank
        return module.rollout(batch, update).responses

    first = responses(3, 0)
    assert torch.equal(first, responses(3, 0))
    for other in (responses(4, 0), responses(3, 1)):
        assert (first == other).float().mean() < 0.2


def test_every_batch_and_every_rank_is_evaluated_by_a_seed_of_its_own(fitted: Make) -> None:
    module, batch = fitted(OnRank)
    module.ppo = replace(SETTINGS, evaluation_temperature=1.0)
    module.log_dict = lambda *args, **kwargs: None

    def responses(index: int, rank: int) -> list[str]:
        module.rank = rank
        return [sample["response"] for sample in module.evaluate(batch, index, "validation")["samples"]]

    first = responses(0, 0)
    assert first == responses(0, 0)
    assert len({*first, *responses(1, 0), *responses(0, 1), *responses(1, 1)}) == 4 * len(first)


class Short(PPOModule):
    """Gives responses of 1 to 3 tokens, where 8 would be allowed."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *args: Any) -> Tensor:
        eos = self.tokenizer.eos_token_id
        return queries.new_tensor([[9, 8, eos], [eos, 5, 5], [9, eos, 5], [7, 6, eos]] * (len(queries) // 4))


def test_the_longest_response_has_a_column_for_its_score(fitted: Make) -> None:
    module, batch = fitted(Short)
    rollout = module.rollout(batch, 0)
    pad, eos = module.tokenizer.pad_token_id, module.tokenizer.eos_token_id
    assert rollout.responses.tolist() == [[9, 8, eos, pad], [eos, pad, pad, pad], [9, eos, pad, pad], [7, 6, eos, pad]]
    assert rollout.value_mask.sum(1).tolist() == [4, 2, 3, 4]
    landed = rollout.rewards.gather(1, rollout.lengths.unsqueeze(1)).squeeze(1)
    assert torch.equal(landed, rollout.scores)


class OwnEngine(PPOModule):
    """Samples by an engine to which every second token is half as probable as to the policy, the others 4 times."""

    @torch.no_grad()
    def sample_responses(self, queries: Tensor, query_mask: Tensor, temperature: float, numbers: Tensor) -> Drawn:
        ids = super().sample_responses(queries, query_mask, temperature, numbers)
        if not self.ppo.importance_cap:
            return ids
        mask = torch.ones_like(ids, dtype=torch.bool)
        logprobs, _ = response_logprobs(self.actor_critic.policy, queries, query_mask, ids, mask, temperature)
        columns = torch.arange(ids.shape[1], device=ids.device)
        return ids, logprobs + torch.where(columns % 2 == 0, 0.25, 2.0).log()


def test_importance_weights_of_an_engine_weigh_the_advantages(fitted: Make, model_path: str, reward_path: str) -> None:
    module, batch = fitted(OwnEngine)
    plain = module.rollout(batch, 0)
    module.ppo = replace(SETTINGS, importance_cap=3.0)
    weighed = module.rollout(batch, 0)
    weights = torch.where(torch.arange(plain.advantages.shape[1], device=module.device) % 2 == 0, 3.0, 0.5)
    torch.testing.assert_close(weighed.advantages, plain.advantages * weights, atol=1e-4, rtol=1e-4)
    assert weighed.advantages.abs().max() > 0.1
    assert torch.equal(weighed.returns, plain.returns)
    OwnEngine(model_path, reward_path, ppo=module.ppo)  # is not refused


def test_importance_weights_need_log_probabilities(fitted: Make) -> None:
    module, batch = fitted(Short)
    module.ppo = replace(SETTINGS, importance_cap=2.0)
    with pytest.raises(UserError, match=r"importance_cap needs .* sample_responses returned none"):
        module.rollout(batch, 0)


def test_rollout_and_training_have_the_same_precision(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make
) -> None:
    module = PPOModule(model_path, reward_path, ppo=SETTINGS, optimization=Optimization(1e-3))
    t = trainer(limit_val_batches=0, precision="bf16-mixed")
    t.fit(module, rollout_data(micro_batch_size=8, rollout_batch_size=8))
    assert t.callback_metrics["val/ratio_max_deviation"] < 1e-5


# ------------------------------------------------------------------------------------------------------------ groups


class Casts(TorchDispatchMode):
    """Counts how often each of some tensors is copied to another precision."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.counts = {tensor.data_ptr(): 0 for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in CASTS and result is not args[0] and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return result


def test_a_rollout_casts_every_trained_weight_at_most_once(fitted: Make) -> None:
    """Decoding is bound by memory traffic: casts at every step would be most of it."""
    module, batch = fitted(PPOModule, precision="bf16-mixed")
    output = module.actor_critic.policy.get_output_embeddings().weight  # once more where log-probabilities are read
    with Casts([weight for weight in module.actor_critic.parameters() if weight is not output]) as casts:
        episodes = module.rollout(batch, 0)
    assert episodes.responses.shape[1] > 1
    assert set(casts.counts.values()) == {0, 1}


def test_validation_casts_every_trained_weight_at_most_once(fitted: Make) -> None:
    """Lightning's own context, in which a batch of validation is, keeps no copies."""
    module, batch = fitted(PPOModule, precision="bf16-mixed")
    plugin = module.trainer.precision_plugin
    with Casts(list(module.actor_critic.parameters())) as casts, torch.no_grad(), plugin.val_step_context():
        episodes = module.respond(batch, 0)
    assert episodes.responses.shape[1] > 1
    assert set(casts.counts.values()) == {0, 1}


def test_validate_casts_every_trained_weight_at_most_once_per_batch(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make
) -> None:
    """In inference mode, Lightning's default, autocast keeps no copies."""
    module = PPOModule(model_path, reward_path, ppo=SETTINGS)
    t, data = trainer(precision="bf16-mixed", limit_val_batches=1), rollout_data()
    t.validate(module, data)
    with Casts(list(module.actor_critic.parameters())) as casts:
        t.validate(module, data)
    assert set(casts.counts.values()) == {0, 1}


class EndsEarly(PPOModule):
    """One token in five is taken for EOS."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, temperature: float, numbers: Tensor) -> Tensor:
        tokens = super().sample_responses(queries, query_mask, temperature, numbers)
        return torch.where(tokens % 5 == 0, self.tokenizer.eos_token_id, tokens)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_a_rollout_does_not_depend_on_its_groups(fitted: Make, batch_of: Make, chunk: int) -> None:
    """Responses token by token, everything else to rounding. No draw of this update is within 1e-5 of another token."""
    module, batch = fitted(EndsEarly)
    data: Any = module.trainer.datamodule
    batch = move_data_to_device(batch_of(data, "train", list(range(16))), module.device)
    alike, other = (module.rollout({**batch, "chunk": c}, 3) for c in (chunk, 2))
    assert alike.lengths.unique().numel() > 3
    for name in Rollout.__annotations__.keys() - {"engine_logprobs"}:  # there is no engine
        torch.testing.assert_close(getattr(alike, name), getattr(other, name), atol=1e-5, rtol=1e-5)
    assert alike.texts == other.texts


def test_rows_of_a_rollout_have_random_numbers_of_their_own(fitted: Make) -> None:
    module, batch = fitted(PPOModule)
    same = {name: batch[name][:1].expand(4, -1) for name in ("queries", "query_mask")}
    rollout = module.rollout({**batch, **same}, 0)
    assert len({tuple(row) for row in rollout.responses.tolist()}) == 4


class Spy(PPOModule):
    """Keeps the shapes that go through a model, and the calls of `score_responses`."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, temperature: float, numbers: Tensor) -> Tensor:
        assert query_mask.any(0).all()  # no column without a token
        assert numbers.shape == (len(queries), self.ppo.response_length)
        self.sampled.append(queries.numel() + len(queries) * self.ppo.response_length)
        return super().sample_responses(queries, query_mask, temperature, numbers)

    def score_responses(self, episodes: Rollout) -> Tensor:
        self.called.append(len(episodes))
        return super().score_responses(episodes)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_no_group_is_larger_than_a_chunk_of_the_longest_rows(
    fitted: Make, batch_of: Make, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = fitted(PPOModule)
    score, scored = ScalarModel.score, []
    monkeypatch.setattr(ScalarModel, "score", lambda self, *args: scored.append(args[0].numel()) or score(self, *args))
    module.__class__ = Spy
    module.sampled, module.called = [], []
    batch = move_data_to_device(batch_of(module.trainer.datamodule, "train", list(range(16))), module.device)
    module.rollout({**batch, "chunk": chunk}, 0)
    limit = chunk * (batch["queries"].shape[1] + SETTINGS.response_length)
    assert max(module.sampled) <= limit
    assert max(scored) <= limit
    assert module.called == [16]
    assert len(module.sampled) >= 16 * 8 / limit
    assert len(module.sampled) <= -(-16 // chunk)


@pytest.mark.parametrize(
    "ranks", [([9, 9, 9, 2], [9, 8, 8, 8]), ([5, 2], [5]), ([3], [9, 2]), ([4] * 6, [9, 7, 5, 3, 2, 1]), ([4], [4])]
)
def test_under_zero3_all_ranks_have_as_many_groups(ranks: tuple[list[int], list[int]]) -> None:
    """And none is empty, for in each there is a forward that gathers weights from all."""
    calls: list[Tensor] = []
    for lengths in ranks:
        groups(lengths, 18, lambda x: calls.append(x) or x, torch.device("cpu"))
    found = [groups(lengths, 18, lambda x: torch.maximum(*calls), torch.device("cpu")) for lengths in ranks]
    assert len({len(each) for each in found}) == 1
    for each, lengths in zip(found, ranks, strict=True):
        assert sorted(row for group in each for row in group) == list(range(len(lengths)))
        assert all(each)
        assert all(len(group) * max(lengths[r] for r in group) <= 18 for group in each)
