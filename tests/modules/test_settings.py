"""Every switch of PPO does what it says and nothing besides: runs that differ in one setting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.models.actor_critic import Evaluation
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings
from rlhf.sampling.rollout import Rollout
from rlhf.synthetic.synthesize import SmallModel, create_model

Make = Callable[..., Any]
EOS = 0
# EOS in the middle, as the first token, at the last position, and none.
RESPONSES = [[9, 8, EOS, 7, 7, 7], [EOS, 5, 5, 5, 5, 5], [6, 5, 4, 3, 9, EOS], [9, 9, 8, 7, 6, 5]]
SETTINGS = PPOSettings(response_length=6, ppo_epochs=2, clip=0.01, value_clip=0.01)  # clips that are reached
FAST = Optimization(3e-3, weight_decay=0.0, schedule="constant")


def size(queries: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    return [float(len(response)) for response in responses]


class Fixed(PPOModule):
    """Gives the same responses in every run, and keeps what its loss saw and gave."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.given = 0
        self.seen: list[tuple[Evaluation, Rollout, float, dict[str, tuple[Tensor, Tensor]]]] = []

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *args: Any) -> Tensor:
        self.given += len(queries)
        return queries.new_tensor([RESPONSES[n % len(RESPONSES)] for n in range(self.given - len(queries), self.given)])

    def loss(self, now: Evaluation, batch: Rollout) -> Any:
        loss, statistics = super().loss(now, batch)
        self.seen.append((Evaluation(*(x.detach() for x in now)), batch, loss.item(), statistics))
        return loss, statistics


@pytest.fixture
def reference_path(tmp_path: Path, tokenizer: Any) -> str:
    """Another model than the policy, so that the KL is not 0."""
    create_model(tmp_path / "reference", tokenizer, SmallModel(32, 2, 2), seed=9)
    return str(tmp_path / "reference")


@pytest.fixture
def update(model_path: str, reward_path: str, reference_path: str, trainer: Make, rollout_data: Make) -> Make:
    """PPO of eight episodes per update, by default one update in one micro-batch; the module and the last rollout."""

    def update(
        kind: type[PPOModule] = Fixed, max_epochs: int = 1, callbacks: Any = (), data: Any = None, **changes: Any
    ) -> tuple[Any, Rollout]:
        ppo = replace(SETTINGS, **changes)
        module = kind(model_path, reward_path, size, reference_path=reference_path, ppo=ppo, optimization=FAST)
        data = rollout_data(**({"micro_batch_size": 8, "rollout_batch_size": 8} | (data or {})))
        trainer(limit_val_batches=0, max_epochs=max_epochs, callbacks=list(callbacks)).fit(module, data)
        return module, data.last_rollout.to("cpu")

    return update


# --------------------------------------------------------------------------------- each switch changes what it names

LEARNT = {"loss", "policy", "critic"}
REWARDED = {"rewards", "returns", "advantages"} | LEARNT
EFFECTS: list[tuple[dict[str, Any], set[str]]] = [
    ({"temperature": 1.3}, {"logprobs", "ref_logprobs", "kl"} | REWARDED),
    ({"kl_estimator": "k2"}, {"kl"} | REWARDED),
    ({"kl_estimator": "k3"}, {"kl"} | REWARDED),
    ({"kl_estimator": "abs"}, {"kl"} | REWARDED),
    ({"kl_coefficient": 0.5}, REWARDED),
    ({"kl_target": 0.01}, set()),
    ({"kl_horizon": 8}, set()),
    ({"missing_eos": "subtract"}, {"scores"} | REWARDED),
    ({"missing_eos_score": -3.0}, {"scores"} | REWARDED),
    ({"missing_eos_score": None}, {"scores"} | REWARDED),
    ({"score_position": "eos"}, {"value_mask", "values"} | REWARDED),
    ({"whiten_rewards": True}, REWARDED),
    ({"gamma": 0.9}, REWARDED - {"rewards"}),
    ({"lam": 0.5}, REWARDED - {"rewards"}),
    ({"whiten_advantages": "off"}, {"advantages", "loss", "policy"}),
    ({"whiten_advantages": "rank"}, set()),  # there is one rank only
    ({"clip": 0.2}, {"policy"}),
    ({"value_clip": 0.2}, {"critic"}),
    ({"value_clip": None}, {"critic"}),
    ({"value_coefficient": 0.7}, {"loss", "critic"}),
    ({"entropy_coefficient": 0.3}, {"loss", "policy"}),
    ({"critic_warmup": 1}, {"loss", "policy"}),
    ({"ppo_epochs": 3}, {"policy", "critic"}),
    ({"minibatches": 2}, LEARNT),
    ({"evaluation_temperature": 2.0}, set()),
    ({"cuda_graphs": True}, set()),  # how the sampler works; the responses are fixed here
]
FIELDS = (
    "responses", "logprobs", "ref_logprobs", "value_mask", "values", "scores", "kl", "rewards", "returns", "advantages",
)  # fmt: skip


def quantities(module: Fixed, rollout: Rollout) -> dict[str, Tensor]:
    """What an update makes: the fields of its rollout, the loss of the first micro-batch, the weights."""
    found = {name: getattr(rollout, name).double() for name in FIELDS}
    found["loss"] = torch.tensor(module.seen[0][2])
    for name, part in module.actor_critic.named_children():
        found[name] = torch.cat([p.detach().flatten() for p in part.parameters()])
    return found


def test_a_switch_changes_what_it_names_and_nothing_besides(update: Make, device: str) -> None:
    near = 1e-6 if device == "cpu" else 3e-5  # a GPU adds up gradients in any order
    micro = {"micro_batch_size": 4}
    before, changed = quantities(*update(data=micro)), {}
    for change, _ in EFFECTS:
        after = quantities(*update(data=micro, **change))
        changed[str(change)] = {name for name in before if not torch.allclose(before[name], after[name], atol=near)}
    assert changed == {str(change): expected for change, expected in EFFECTS}


def test_every_setting_of_ppo_is_switched() -> None:
    switched = {name for change, _ in EFFECTS for name in change}
    of_groups, of_engines = {"advantage", "samples_per_prompt", "kl_in"}, {"vllm_cache_gib", "importance_cap"}
    elsewhere = {"response_length"} | of_groups | of_engines  # test_groups.py, engines
    assert switched | elsewhere == {field.name for field in fields(PPOSettings)}


# -------------------------------------------------------------------------------------------- and what it changes


def logits(path: str, rollout: Rollout, n: int) -> Tensor:
    """Of plain transformers for the tokens of an unpadded response, `(length, V)`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    query, response = rollout.queries[n][rollout.query_mask[n].bool()], rollout.responses[n, : rollout.lengths[n]]
    with torch.no_grad():
        return model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda ratio: ratio.log()),
        ("k2", lambda ratio: ratio.log() ** 2 / 2),
        ("k3", lambda ratio: 1 / ratio - 1 + ratio.log()),
        ("abs", lambda ratio: ratio.log().abs()),
    ],
)
def test_kl_is_that_of_the_policy_against_the_reference(
    update: Make, model_path: str, reference_path: str, estimator: str, formula: Callable[[Tensor], Tensor]
) -> None:
    _, rollout = update(kl_estimator=estimator, missing_eos_score=None)
    for n in range(len(RESPONSES)):
        tokens = rollout.responses[n, : rollout.lengths[n]]
        policy, reference = (
            F.softmax(logits(path, rollout, n).double() / 0.7, -1).gather(1, tokens[:, None]).squeeze(1)
            for path in (model_path, reference_path)
        )
        kl = formula(policy / reference)
        penalty = (rollout.rewards[n].sum() - rollout.scores[n]).item()
        torch.testing.assert_close(rollout.kl[n, : len(tokens)].double(), kl, atol=1e-5, rtol=1e-4)
        assert penalty == pytest.approx(-0.05 * kl.sum().item(), abs=1e-5)
        assert kl.abs().sum() > 1e-3


def test_an_adaptive_coefficient_follows_the_kl_of_each_update(update: Make) -> None:
    used, kls = [], []

    class Spy(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            r = trainer.datamodule.last_rollout
            kls.append(r.kl.sum(1).mean().item())
            used.append(((r.scores.sum() - r.rewards.sum()) / r.kl.sum()).item())

    _, rollout = update()
    target = rollout.kl.sum(1).mean().item() / 1.1  # the first error is 0.1: not clipped
    module, _ = update(max_epochs=4, callbacks=[Spy()], kl_target=target, kl_horizon=40, kl_coefficient=0.5)
    expected = [0.5]
    for kl in kls:
        expected.append(expected[-1] * (1 + min(max(kl / target - 1, -0.2), 0.2) * 8 / 40))
    assert used == pytest.approx(expected[:4], rel=1e-3)
    assert module.kl_control.coefficient == pytest.approx(expected[4], rel=1e-5)
    assert expected[1] == pytest.approx(0.5 * 1.02, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "without_eos"),
    [
        ({}, lambda score: -1.0),
        ({"missing_eos_score": -3.0}, lambda score: -3.0),
        ({"missing_eos": "subtract", "missing_eos_score": -3.0}, lambda score: score - 3.0),
        ({"missing_eos_score": None}, lambda score: score),
    ],
    ids=["paper", "replace", "subtract", "off"],
)
def test_missing_eos(update: Make, reward_path: str, change: Any, without_eos: Callable[[float], float]) -> None:
    _, rollout = update(**change)
    model = ScalarModel.from_pretrained(reward_path, "reward")
    for n, given in enumerate(RESPONSES):
        query = rollout.queries[n][rollout.query_mask[n].bool()].tolist()
        tokens = given[: given.index(EOS) + 1] if EOS in given else given
        ids = torch.tensor([query + tokens])
        score = model.score(ids, torch.ones_like(ids)).item() + len(rollout.texts[n]["response"])
        expected = score if EOS in given else without_eos(score)
        assert rollout.scores[n].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("position", "columns"), [("after_eos", [3, 1, 5, 5]), ("eos", [2, 0, 5, 5])])
def test_the_score_lands_where_it_is_told_to(update: Make, position: str, columns: list[int]) -> None:
    _, rollout = update(score_position=position, kl_coefficient=0.0)
    assert rollout.rewards.nonzero()[:4].tolist() == [[row, column] for row, column in enumerate(columns)]
    assert rollout.rewards[range(4), columns].tolist() == rollout.scores[:4].tolist()


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.5), (1.0, 0.5), (0.9, 1.0)])
def test_advantages_have_their_discounts(update: Make, gamma: float, lam: float) -> None:
    _, rollout = update(gamma=gamma, lam=lam, whiten_advantages="off")
    for n in range(len(RESPONSES)):
        states = int(rollout.value_mask[n].sum())
        rewards, values = rollout.rewards[n].tolist(), [*rollout.values[n, :states].tolist(), 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(states)]
        expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, states)) for t in range(states)]
        assert rollout.returns[n, :states].tolist() == pytest.approx(
            [e + v for e, v in zip(expected, values, strict=False)], abs=1e-4
        )
        length = int(rollout.lengths[n])
        assert rollout.advantages[n].tolist() == pytest.approx(expected[:length] + [0.0] * (6 - length), abs=1e-4)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_without_clipping_the_value_loss_is_the_squared_error(update: Make, clip: float | None) -> None:
    module, _ = update(value_clip=clip)
    now, batch, _, statistics = module.seen[1]
    losses, mask = statistics["loss/value_avg"]
    unclipped = (now.values - batch.returns) ** 2 / 2
    assert torch.equal(losses[mask], unclipped[mask]) == (clip is None)
    assert (statistics["val/clipfrac_avg"][0][mask].sum() > 0) == (clip is not None)
    assert (now.values - batch.values)[mask].abs().max() > 0.01


def test_an_entropy_bonus_is_taken_off_the_loss(update: Make, model_path: str) -> None:
    (plain, rollout), (with_bonus, _) = update(), update(entropy_coefficient=0.3)
    entropies = []
    for n in range(len(rollout)):
        p = F.softmax(logits(model_path, rollout, n).double() / 0.7, -1)
        entropies.append(-(p * p.log()).sum(-1))
    mean = torch.cat(entropies).mean().item()
    assert plain.seen[0][2] - with_bonus.seen[0][2] == pytest.approx(0.3 * mean, abs=1e-4)


def test_minibatches_are_steps_and_share_out_each_pass(update: Make) -> None:
    micro = {"micro_batch_size": 2}
    module, rollout = update(ppo_epochs=3, minibatches=2, data=micro)
    steps = [module.seen[n : n + 2] for n in range(0, len(module.seen), 2)]  # 8 episodes / 2 minibatches / 2 = 2
    assert module.trainer.global_step == len(steps) == 6
    queries = [sorted(text["query"] for _, batch, _, _ in step for text in batch.texts) for step in steps]
    for first, second in zip(queries[::2], queries[1::2], strict=True):
        assert sorted(first + second) == sorted(text["query"] for text in rollout.texts)
        assert len(set(first + second)) == 8
    assert len({str(q) for q in queries[::2]}) > 1  # another division in another pass
    for step in steps:
        tokens = sum(int(batch.mask.sum()) for _, batch, _, _ in step)
        assert [batch.policy_share for _, batch, _, _ in step] == [tokens / 2] * 2


def test_the_policy_learns_from_the_update_after_the_warm_up(update: Make) -> None:
    kept: list[Tensor] = []

    class Spy(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            kept.append(torch.cat([p.detach().flatten() for p in pl_module.actor_critic.policy.parameters()]))

    update(max_epochs=3, callbacks=[Spy()], critic_warmup=2)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


# ---------------------------------------------------------------------------------------------------- two processes


class TwoRanks(PPOModule):
    """Two threads, each of which is a rank; they share the networks, so that one computes while the other waits."""

    here = threading.local()
    barrier = threading.Barrier(2, timeout=60)
    turn = threading.Lock()

    @property
    def global_rank(self) -> int:
        return getattr(self.here, "rank", 0)

    def reduce_sum(self, x: Tensor) -> Tensor:
        if not hasattr(self.here, "rank"):
            return x
        self.brought[self.here.rank] = x
        self.turn.release()
        self.barrier.wait()
        total = self.brought[0] + self.brought[1]
        self.barrier.wait()
        self.turn.acquire()
        return total

    def rollouts(self, batch: dict[str, Any]) -> list[Rollout]:
        """The rollout of each rank."""
        self.brought: list[Any] = [None, None]

        def of_rank(rank: int) -> Rollout:
            self.here.rank = rank
            with self.turn:
                return self.rollout(batch, 0)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(of_rank, range(2)))


@pytest.fixture
def two_ranks(update: Make, batch_of: Make) -> Make:
    """What two ranks make of the same eight prompts."""

    def two_ranks(**changes: Any) -> list[Rollout]:
        module, _ = update(TwoRanks, **changes)
        module.actor_critic = None  # back to the networks before the update
        module.configure_model()
        module.to(module.weights_device)  # after a run it is on the CPU
        batch = batch_of(module.trainer.datamodule, "train", list(range(8)))
        return module.rollouts({**move_data_to_device(batch, module.device), "chunk": 8})

    return two_ranks


def test_ranks_sample_differently(two_ranks: Make) -> None:
    (one, other), (again, _) = two_ranks(), two_ranks()
    assert torch.equal(one.queries, other.queries)
    assert not any(torch.equal(a, b) for a, b in zip(one.responses, other.responses, strict=True))
    assert torch.equal(one.responses, again.responses)


@pytest.mark.parametrize(
    ("over", "white", "each_white"), [("global", True, False), ("rank", True, True), ("off", False, False)]
)
def test_advantages_are_whitened_over_all_ranks_or_each(
    two_ranks: Make, over: str, white: bool, each_white: bool
) -> None:
    def is_white(*rollouts: Rollout) -> bool:
        values = torch.cat([r.advantages[r.mask] for r in rollouts])
        return abs(values.mean().item()) < 1e-5 and abs(values.var(correction=0).item() - 1) < 1e-4

    one, other = two_ranks(whiten_advantages=over)
    assert is_white(one, other) == white
    assert [is_white(one), is_white(other)] == [each_white] * 2


def test_rewards_are_whitened_over_all_ranks(two_ranks: Make) -> None:
    raw, whitened = (
        torch.cat([r.rewards[r.value_mask] for r in two_ranks(whiten_rewards=on, missing_eos_score=-3.0)])
        for on in (False, True)
    )
    expected = (raw - raw.mean()) / raw.std(correction=0) + raw.mean()
    torch.testing.assert_close(whitened, expected, atol=1e-4, rtol=1e-4)
    assert abs(raw.std().item() - 1) > 0.1
