"""A rollout and its loss against the paper's formulas, written out for one unpadded episode at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.data.embedded import SmallModel, create_model
from rlhf.generation import sample
from rlhf.models.actor_critic import Evaluation
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings
from rlhf.rollout import Rollout

Make = Callable[..., Any]
EOS = 0
# EOS in the middle, as the first token, a second EOS, at the last position, and none.
RESPONSES = [
    [9, 8, EOS, 7, 7, 7],
    [EOS, 5, 5, 5, 5, 5],
    [4, EOS, 3, EOS, 3, 3],
    [6, 5, 4, 3, 9, EOS],
    [9, 9, 8, 7, 6, 5],
]
SETTINGS = PPOSettings(response_length=6, ppo_epochs=2)
VARIANTS = {
    "paper": {},
    "temperature": {"temperature": 1.3},
    "k2": {"kl_estimator": "k2", "kl_coefficient": 0.5},
    "k3": {"kl_estimator": "k3", "kl_coefficient": 0.5},
    "abs": {"kl_estimator": "abs", "kl_coefficient": 0.5},
    "subtract": {"missing_eos": "subtract", "missing_eos_score": -2.0},
    "no EOS trick": {"missing_eos_score": None},
    "score on EOS": {"score_position": "eos"},
    "whitened rewards": {"whiten_rewards": True},
    "raw advantages": {"whiten_advantages": "off"},
    "gamma and lambda": {"gamma": 0.9, "lam": 0.5},
    "clips": {"clip": 0.001, "value_clip": 0.001},
    "no value clip": {"value_clip": None, "value_coefficient": 0.7},
    "entropy bonus": {"entropy_coefficient": 0.3},
}


class Recorder(PPOModule):
    """Gives fixed responses, and keeps what its loss saw."""

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *args: Any) -> Tensor:
        self.given = getattr(self, "given", 0) + len(queries)
        return torch.tensor([RESPONSES[n % len(RESPONSES)] for n in range(self.given - len(queries), self.given)])

    def loss(self, now: Evaluation, batch: Rollout) -> Any:
        result = super().loss(now, batch)
        self.seen = [*getattr(self, "seen", []), (Evaluation(*(x.detach() for x in now)), batch, result)]
        return result


@pytest.fixture
def reference_path(tmp_path: Path, tokenizer: Any) -> str:
    """Another model than the policy, so that the KL is not 0."""
    create_model(tmp_path / "reference", tokenizer, SmallModel(32, 2, 2), seed=9)
    return str(tmp_path / "reference")


@pytest.fixture(params=VARIANTS)
def run(
    request: pytest.FixtureRequest, model_path: str, reward_path: str, reference_path: str, trainer: Make,
    rollout_data: Make,
) -> tuple[Recorder, Rollout, PPOSettings]:  # fmt: skip
    """One update of eight episodes, in one micro-batch."""
    settings = replace(SETTINGS, **VARIANTS[request.param])
    module = Recorder(
        model_path, reward_path, reference_path=reference_path, ppo=settings, optimization=Optimization(1e-2)
    )
    data = rollout_data(micro_batch_size=8, rollout_batch_size=3)
    trainer(limit_val_batches=0).fit(module, data)
    return module, data.last_rollout, settings


def logprobs(model: Any, ids: list[int], start: int, temperature: float) -> np.ndarray:
    logits = model(torch.tensor([ids])).logits[0].double() / temperature
    return logits.log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]].detach().numpy()


KL = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: np.exp(-d) - 1 + d,
    "abs": np.abs,
}


def expected(rollout: Rollout, paths: tuple[str, str, str], s: PPOSettings) -> list[dict[str, Any]]:
    """What the formulas give for each episode: numpy, no padding, no batch, sums written out."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (paths[0], paths[2]))
    reward_model = ScalarModel.from_pretrained(paths[1], "reward")  # the critic starts from it, too
    width = s.response_length
    episodes = []
    for n in range(len(rollout)):
        query = rollout.queries[n][rollout.query_mask[n].bool()].tolist()
        fixed = RESPONSES[n % len(RESPONSES)]
        ended = EOS in fixed
        length = fixed.index(EOS) + 1 if ended else len(fixed)
        ids, start = query + fixed[:length], len(query)
        numbers = reward_model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0].double()
        score = numbers[-1].item()
        if not ended and s.missing_eos_score is not None:
            score = s.missing_eos_score if s.missing_eos == "replace" else score - abs(s.missing_eos_score)
        states = length if s.score_position == "eos" or length == width else length + 1
        values = numbers[start - 1 : start - 1 + states].detach().numpy()
        old = logprobs(policy, ids, start, s.temperature)
        kl = KL[s.kl_estimator](old - logprobs(reference, ids, start, s.temperature))
        rewards = np.zeros(states)
        rewards[:length] = -s.kl_coefficient * kl
        rewards[-1] += score
        episodes.append({"length": length, "old": old, "kl": kl, "values": values, "score": score, "rewards": rewards})
    if s.whiten_rewards:
        everything = np.concatenate([e["rewards"] for e in episodes])
        for e in episodes:
            e["rewards"] = (e["rewards"] - everything.mean()) / np.sqrt(everything.var() + 1e-8) + everything.mean()
    for e in episodes:
        states, values = len(e["values"]), np.append(e["values"], 0)
        deltas = [e["rewards"][t] + s.gamma * values[t + 1] - values[t] for t in range(states)]
        decay = s.gamma * s.lam
        gae = [sum(decay ** (k - t) * deltas[k] for k in range(t, states)) for t in range(states)]
        e["returns"] = np.array(gae) + e["values"]
        e["advantages"] = np.array(gae)[: e["length"]]
    if s.whiten_advantages != "off":
        everything = np.concatenate([e["advantages"] for e in episodes])
        for e in episodes:
            e["advantages"] = (e["advantages"] - everything.mean()) / np.sqrt(everything.var() + 1e-8)
    return episodes


def test_rollout_and_loss_are_those_of_the_formulas(
    run: tuple[Recorder, Rollout, PPOSettings], model_path: str, reward_path: str, reference_path: str
) -> None:
    module, rollout, s = run
    episodes = expected(rollout, (model_path, reward_path, reference_path), s)
    close = {"atol": 2e-5, "rtol": 2e-5}
    for n, e in enumerate(episodes):
        length, states = e["length"], len(e["values"])
        assert (int(rollout.lengths[n]), int(rollout.mask[n].sum())) == (length, length)
        assert int(rollout.value_mask[n].sum()) == states
        np.testing.assert_allclose(rollout.logprobs[n, :length], e["old"], **close)
        np.testing.assert_allclose(rollout.kl[n, :length], e["kl"], **close)
        np.testing.assert_allclose(rollout.values[n, :states], e["values"], **close)
        np.testing.assert_allclose(rollout.scores[n], e["score"], **close)
        np.testing.assert_allclose(rollout.rewards[n, :states], e["rewards"], **close)
        np.testing.assert_allclose(rollout.returns[n, :states], e["returns"], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(rollout.advantages[n, :length], e["advantages"], atol=1e-4, rtol=1e-3)
    assert len(module.seen) == s.ppo_epochs
    for now, batch, (loss, statistics) in module.seen:
        check_loss(now, batch, loss.item(), s)
        real = batch.mask.numpy()
        ratio = np.exp((now.logprobs - batch.logprobs).numpy()[real])
        means = {"policy/entropy_avg": now.entropy.numpy()[real].mean(), "val/ratio": ratio.mean()}
        means |= {"val/ratio_var": ((ratio - 1) ** 2).mean(), "policy/approxkl_avg": (np.log(ratio) ** 2 / 2).mean()}
        for name, mean in means.items():
            values, mask = statistics[name]
            assert values[mask].mean().item() == pytest.approx(float(mean), abs=1e-6)
    moved = module.seen[1][0].logprobs - module.seen[1][1].logprobs
    assert moved.abs().max() > 1e-3  # the second pass does have ratios other than 1


def check_loss(now: Evaluation, batch: Rollout, loss: float, s: PPOSettings) -> None:
    """The loss of one micro-batch that is the whole batch, token by token."""
    policy, value, entropy = [], [], []
    for n, t in batch.mask.nonzero().tolist():
        ratio = np.exp(float(now.logprobs[n, t] - batch.logprobs[n, t]))
        advantage = float(batch.advantages[n, t])
        policy.append(max(-advantage * ratio, -advantage * min(max(ratio, 1 - s.clip), 1 + s.clip)))
        entropy.append(float(now.entropy[n, t]))
    for n, t in batch.value_mask.nonzero().tolist():
        new, old, target = (float(x[n, t]) for x in (now.values, batch.values, batch.returns))
        near = new if s.value_clip is None else old + min(max(new - old, -s.value_clip), s.value_clip)
        value.append(0.5 * max((new - target) ** 2, (near - target) ** 2))
    wanted = np.mean(policy) + s.value_coefficient * np.mean(value) - s.entropy_coefficient * np.mean(entropy)
    assert loss == pytest.approx(wanted, abs=1e-5, rel=1e-5)


def test_sampling_is_at_its_temperature_and_validation_at_its_own(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    temperatures: list[float] = []

    def spy(*args: Any, **settings: Any) -> Tensor:
        temperatures.append(settings["temperature"])
        return sample(*args, **settings)

    monkeypatch.setattr("rlhf.modules.experience.sample", spy)
    module = PPOModule(model_path, reward_path, ppo=replace(SETTINGS, evaluation_temperature=0.02))
    trainer().fit(module, rollout_data(rollout_batch_size=8))
    assert temperatures == [0.7, 0.02]


@pytest.mark.parametrize("placement", ["device", "cpu"])
def test_placement_changes_no_number(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make, placement: Any
) -> None:
    module = PPOModule(model_path, reward_path, reference_placement=placement, reward_placement=placement, ppo=SETTINGS)
    data = rollout_data()
    trainer(limit_val_batches=0).fit(module, data)
    assert data.last_rollout.scores.isfinite().all()
    assert data.last_rollout.kl.abs().max() < 1e-4


def test_warming_up_the_critic_leaves_the_policy_alone(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make
) -> None:
    settings = replace(SETTINGS, critic_warmup=1)
    module = PPOModule(
        model_path, reward_path, ppo=settings, optimization=Optimization(1e-2, weight_decay=0.0, schedule="constant")
    )
    module.configure_model()
    before = [[p.detach().clone() for p in part.parameters()] for part in module.actor_critic.children()]
    trainer(limit_val_batches=0, max_epochs=1).fit(module, rollout_data())
    moved = [
        any(not torch.equal(a, b) for a, b in zip(old, part.parameters(), strict=True))
        for old, part in zip(before, module.actor_critic.children(), strict=True)
    ]
    assert moved == [False, True]
