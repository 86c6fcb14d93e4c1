"""A rollout, its loss and its gradients against the paper's formulas, written out for each unpadded episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.callbacks.invariants import Invariants
from rlhf.models.actor_critic import Evaluation
from rlhf.modules import Optimization, PPOModule, PPOSettings
from rlhf.sampling.rollout import Rollout
from rlhf.sampling.sampler import sample

Make = Callable[..., Any]
EOS, SHIFT = 0, 0.25
# EOS in the middle, as the first token, a second EOS, at the last position, and none.
RESPONSES = [
    [9, 8, EOS, 7, 7, 7],
    [EOS, 5, 5, 5, 5, 5],
    [4, EOS, 3, EOS, 3, 3],
    [6, 5, 4, 3, 9, EOS],
    [9, 9, 8, 7, 6, 5],
]
SETTINGS = PPOSettings(response_length=6, ppo_epochs=2)
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "learned positions": {},
    "means of micro-batches": {},
    "two minibatches": {"minibatches": 2},
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
    "clips": {"clip": 0.05, "value_clip": 0.05},
    "no value clip": {"value_clip": None, "value_coefficient": 0.7},
    "entropy bonus": {"entropy_coefficient": 0.3},
    "critic warm-up": {"critic_warmup": 1},
    "filter": {},
}


@dataclass
class Step:
    """What an optimizer step saw: micro-batches with their losses; weights and gradients just before it."""

    batches: list[Rollout]
    losses: list[float]
    statistics: list[dict[str, tuple[Tensor, Tensor]]]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Recorder(PPOModule):
    """Gives fixed responses, and keeps what its steps saw; with `filtering`, it has no score for the third of them."""

    filtering = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.given = 0
        self.seen: list[tuple[Rollout, float, Any]] = []
        self.steps: list[Step] = []

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *args: Any) -> Tensor:
        self.given += len(queries)
        return queries.new_tensor([RESPONSES[n % len(RESPONSES)] for n in range(self.given - len(queries), self.given)])

    def score_responses(self, episodes: Rollout) -> Tensor:
        scores = super().score_responses(episodes)
        return scores.masked_fill(episodes.responses[:, 0] == RESPONSES[2][0], np.nan) if self.filtering else scores

    def keep_episodes(self, episodes: Rollout) -> Tensor:
        return episodes.scores.isfinite() & super().keep_episodes(episodes)

    def loss(self, now: Evaluation, batch: Rollout) -> Any:
        loss, statistics = super().loss(now, batch)
        self.seen.append((batch.to("cpu"), loss.item(), move_data_to_device(statistics, "cpu")))
        return loss, statistics

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        parameters = dict(self.actor_critic.named_parameters())
        weights = {name: p.detach().clone().cpu() for name, p in parameters.items()}
        gradients = {name: p.grad.clone().cpu() for name, p in parameters.items()}
        self.steps.append(Step(*map(list, zip(*self.seen, strict=True)), weights, gradients))
        self.seen = []


@pytest.fixture(scope="module")
def make_networks(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], dict[str, str]]:
    """Folders of a policy, a reference and a reward model, with weights so large that no quantity is near 0."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
    shape |= {"intermediate_size": 64, "num_labels": 1}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": EOS, "bos_token_id": EOS}

    @cache
    def make(architecture: str) -> dict[str, str]:
        config = AutoConfig.for_model(
            architecture, vocab_size=512, initializer_range=0.2, reward_shift=SHIFT, **shape, **special
        )
        folders = {}
        for seed, name in enumerate(("policy", "reference", "reward")):
            kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
            folders[name] = str(tmp_path_factory.mktemp(f"{architecture}_{name}"))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                kind.from_config(config).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders

    return make


class Networks:
    """Policy, reference, reward model and critic in plain transformers and float64, on one unpadded row at a time."""

    def __init__(self, paths: dict[str, str]) -> None:
        names, language = ("policy", "reference"), AutoModelForCausalLM
        self.policy, self.reference = (language.from_pretrained(paths[n], dtype=torch.float64) for n in names)
        scalar = AutoModelForSequenceClassification
        self.reward, self.critic = (scalar.from_pretrained(paths["reward"], dtype=torch.float64) for _ in range(2))
        self.critic_bias = torch.tensor(-SHIFT, dtype=torch.float64, requires_grad=True)

    def trained(self) -> dict[str, Tensor]:
        """Policy and critic under the names that PPOModule has for them."""
        critic = {f"critic.model.{name}": p for name, p in self.critic.named_parameters()}
        policy = {f"policy.{name}": p for name, p in self.policy.named_parameters()}
        return {**policy, **critic, "critic.bias": self.critic_bias}

    @staticmethod
    def log_probabilities(model: Any, ids: list[int], start: int, temperature: float) -> Tensor:
        """Of every token of the vocabulary at the places of `ids[start:]`."""
        return (model(torch.tensor([ids])).logits[0, start - 1 : -1] / temperature).log_softmax(-1)

    def score(self, ids: list[int]) -> Tensor:
        return self.reward(torch.tensor([ids])).logits[0, 0] - SHIFT

    def values(self, ids: list[int]) -> Tensor:
        """After each token."""
        hidden = self.critic.base_model(torch.tensor([ids])).last_hidden_state[0]
        return self.critic.score(hidden)[:, 0] + self.critic_bias


KL = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: np.exp(-d) - 1 + d,
    "abs": np.abs,
}


def pattern_of(response: list[int]) -> int:
    """Which of the fixed responses this is: their first two tokens differ, up to EOS."""
    return next(i for i, r in enumerate(RESPONSES) if r[0] == response[0] and (r[0] == EOS or r[1] == response[1]))


@torch.no_grad()
def expected(rollout: Rollout, networks: Networks, s: PPOSettings, filtering: bool) -> dict[int, dict[str, Any]]:
    """What the formulas give for each episode that is kept: numpy, no padding, no batch, sums written out."""
    width = s.response_length
    episodes = {}
    patterns = [pattern_of(row) for row in rollout.responses.tolist()]
    for n in [n for n in range(len(rollout)) if not (filtering and patterns[n] == 2)]:
        query = rollout.queries[n][rollout.query_mask[n].bool()].tolist()
        fixed = RESPONSES[patterns[n]]
        ended = EOS in fixed
        length = fixed.index(EOS) + 1 if ended else len(fixed)
        ids, start = query + fixed[:length], len(query)
        score = networks.score(ids).item()
        if not ended and s.missing_eos_score is not None:
            score = s.missing_eos_score if s.missing_eos == "replace" else score - abs(s.missing_eos_score)
        states = length if s.score_position == "eos" or length == width else length + 1
        values = networks.values(ids)[start - 1 : start - 1 + states].numpy()
        old, reference = (
            networks.log_probabilities(model, ids, start, s.temperature)[range(length), ids[start:]].numpy()
            for model in (networks.policy, networks.reference)
        )
        kl = KL[s.kl_estimator](old - reference)
        rewards = np.zeros(states)
        rewards[:length] = -s.kl_coefficient * kl
        rewards[-1] += score
        e = {"ids": ids, "start": start, "logprobs": old, "ref_logprobs": reference, "kl": kl, "values": values}
        episodes[n] = {**e, "scores": score, "rewards": rewards}
    if s.whiten_rewards:
        everything = np.concatenate([e["rewards"] for e in episodes.values()])
        for e in episodes.values():
            e["rewards"] = (e["rewards"] - everything.mean()) / np.sqrt(everything.var() + 1e-8) + everything.mean()
    for e in episodes.values():
        states, values = len(e["values"]), np.append(e["values"], 0)
        deltas = [e["rewards"][t] + s.gamma * values[t + 1] - values[t] for t in range(states)]
        decay = s.gamma * s.lam
        gae = [sum(decay ** (k - t) * deltas[k] for k in range(t, states)) for t in range(states)]
        e["returns"] = np.array(gae) + e["values"]
        e["advantages"] = np.array(gae)[: len(e["kl"])]
    if s.whiten_advantages != "off":
        everything = np.concatenate([e["advantages"] for e in episodes.values()])
        for e in episodes.values():
            e["advantages"] = (e["advantages"] - everything.mean()) / np.sqrt(everything.var() + 1e-8)
    return episodes


def written_out(networks: Networks, episodes: list[dict[str, Any]], s: PPOSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over some episodes, and its statistics per token, from the networks as they are now."""
    columns: dict[str, list[Tensor]] = {}
    for e in episodes:
        old, advantages, values, returns = (
            torch.from_numpy(e[name]) for name in ("logprobs", "advantages", "values", "returns")
        )
        logs = networks.log_probabilities(networks.policy, e["ids"], e["start"], s.temperature)
        difference = logs[range(len(old)), e["ids"][e["start"] :]] - old
        ratio = difference.exp()
        taken, limited = -advantages * ratio, -advantages * ratio.clamp(1 - s.clip, 1 + s.clip)
        new = networks.values(e["ids"])[e["start"] - 1 :][: len(values)]
        reach = s.value_clip if s.value_clip is not None else np.inf
        near = torch.minimum(torch.maximum(new, values - reach), values + reach)
        error, near_error = (new - returns) ** 2, (near - returns) ** 2
        episode = {
            "loss/policy_avg": torch.maximum(taken, limited),
            "policy/entropy_avg": -(logs.exp() * logs).sum(-1),
            "policy/clipfrac_avg": (limited > taken).double(),
            "policy/approxkl_avg": difference**2 / 2,
            "val/ratio": ratio,
            "val/ratio_var": (ratio - 1) ** 2,
            "loss/value_avg": torch.maximum(error, near_error) / 2,
            "val/clipfrac_avg": (near_error > error).double(),
        }
        for name, numbers in episode.items():
            columns.setdefault(name, []).append(numbers)
    tokens = {name: torch.cat(parts) for name, parts in columns.items()}
    actor = tokens["loss/policy_avg"].mean() - s.entropy_coefficient * tokens["policy/entropy_avg"].mean()
    return (not s.critic_warmup) * actor + s.value_coefficient * tokens["loss/value_avg"].mean(), tokens


def check_rollout(rollout: Rollout, episodes: dict[int, dict[str, Any]]) -> None:
    for n in range(len(rollout)):
        e = episodes.get(n, {"kl": [], "values": []})  # of an episode that is not kept, nothing counts
        assert int(rollout.mask[n].sum()) == len(e["kl"])
        assert int(rollout.value_mask[n].sum()) == len(e["values"])
    for n, e in episodes.items():
        assert int(rollout.lengths[n]) == len(e["kl"])
        for name in ("logprobs", "ref_logprobs", "kl", "values", "rewards", "advantages", "returns"):
            actual = getattr(rollout, name)[n, : len(e[name])].numpy()
            np.testing.assert_allclose(actual, e[name], atol=1e-5, rtol=1e-5, err_msg=name)
        assert rollout.scores[n].item() == pytest.approx(e["scores"], abs=1e-5)


def with_numbers_of(rollout: Rollout, episodes: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The episodes with the float32 numbers that the loss is computed from, which `check_rollout` has compared.

    Where the terms of a minibatch nearly cancel, a rounding of the advantages is large beside their sum.
    """
    used = ("logprobs", "values", "advantages", "returns")
    return {
        n: e | {name: getattr(rollout, name)[n, : len(e[name])].double().numpy() for name in used}
        for n, e in episodes.items()
    }


def check_step(step: Step, networks: Networks, groups: list[list[dict[str, Any]]], s: PPOSettings) -> None:
    """Loss, statistics and gradients; the loss is the mean over `groups` of episodes."""
    trained = networks.trained()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(step.weights[name].view_as(p))
            p.grad = torch.zeros_like(p)
    losses, tokens = zip(*[written_out(networks, group, s) for group in groups], strict=True)
    loss = sum(losses) / len(losses)
    loss.backward()
    assert np.mean(step.losses) == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    for name in tokens[0]:
        actual = torch.cat([values[mask] for values, mask in (part[name] for part in step.statistics)]).mean()
        wanted = torch.cat([t[name] for t in tokens]).mean()
        assert actual.item() == pytest.approx(wanted.item(), abs=1e-5, rel=1e-5), name
    assert step.gradients.keys() == trained.keys()
    for network in ("policy", "critic"):
        names = [name for name in trained if name.startswith(network)]
        largest = max(trained[name].grad.abs().max().item() for name in names)
        assert largest > 0.01 or (network == "policy" and s.critic_warmup)
        for name in names:
            wanted = trained[name].grad
            actual = step.gradients[name].view_as(wanted)
            np.testing.assert_allclose(actual, wanted, atol=1e-5 * largest, rtol=0, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_loss_and_gradients_are_those_of_the_formulas(
    variant: str, make_networks: Callable[[str], dict[str, str]], trainer: Make, rollout_data: Make
) -> None:
    """One update: eight episodes, two passes, micro-batches of four; gradients within 1e-5 of the largest."""
    s = replace(SETTINGS, **VARIANTS[variant])
    paths = make_networks("gpt2" if variant == "learned positions" else "gpt_neox")
    by_micro_batch = variant == "means of micro-batches"
    optimization = Optimization(1e-3, loss_reduction="microbatch" if by_micro_batch else "minibatch")
    module = Recorder(
        paths["policy"], paths["reward"], reference_path=paths["reference"], ppo=s, optimization=optimization
    )
    module.filtering = variant == "filter"
    data = rollout_data(rollout_batch_size=3)
    trainer(limit_val_batches=0, callbacks=[Invariants(finite="off")]).fit(module, data)
    rollout, networks = data.last_rollout.to("cpu"), Networks(paths)
    episodes = expected(rollout, networks, s, module.filtering)
    check_rollout(rollout, episodes)
    episodes = with_numbers_of(rollout, episodes)
    assert len(module.steps) == s.ppo_epochs * s.minibatches
    for step in module.steps:
        rows = [[rollout.texts.index(text) for text in batch.texts] for batch in step.batches]
        groups = [[episodes[n] for n in part if n in episodes] for part in rows]
        check_step(step, networks, groups if by_micro_batch else [list(chain(*groups))], s)
    if variant == "paper":
        clipped = [module.steps[-1].statistics[0][f"{name}/clipfrac_avg"] for name in ("policy", "val")]
        assert all(0 < values[mask].mean() < 1 for values, mask in clipped)


def test_sampling_is_at_its_temperature_and_validation_at_its_own(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    temperatures: list[float] = []

    def spy(*args: Any) -> Tensor:
        temperatures.append(args[-1].temperature)
        return sample(*args)

    monkeypatch.setattr("rlhf.sampling.cuda_graphs.sample", spy)
    module = PPOModule(model_path, reward_path, ppo=replace(SETTINGS, evaluation_temperature=0.02))
    trainer().fit(module, rollout_data(rollout_batch_size=8))
    assert temperatures == [0.7, 0.02]


def test_placement_changes_no_number(model_path: str, reward_path: str, trainer: Make, rollout_data: Make) -> None:
    rollouts = []
    for placement in ("device", "cpu"):
        where: Any = {"reference_placement": placement, "reward_placement": placement}
        data = rollout_data()
        trainer(limit_val_batches=0).fit(PPOModule(model_path, reward_path, ppo=SETTINGS, **where), data)
        rollouts.append(data.last_rollout)
    for name in ("responses", "ref_logprobs", "scores", "returns"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts)), name
    assert rollouts[0].kl.abs().max() < 1e-4
    assert rollouts[0].scores.isfinite().all()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_warming_up_the_critic_leaves_policy_and_optimizer_as_new(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make, clip: float | None
) -> None:
    """An update of the critic alone, then three of both, of two steps each.

    Their gradients give, to the last bit, the steps of a new AdamW, the first of which is written out too.
    """
    seen: list[list[list[Tensor]]] = []
    logged: list[float] = []

    class Spy(PPOModule):
        def on_train_start(self) -> None:
            parts = [list(part.parameters()) for part in self.actor_critic.children()]
            seen.append([[p.detach().clone() for p in part] for part in parts])

            def after(*args: Any) -> None:
                seen.append([[x.clone() for p in part for x in (p.detach(), p.grad)] for part in parts])

            self.trainer.optimizers[0].register_step_post_hook(after)

        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            logged.append(float(self.trainer.callback_metrics["lr"]))

    optimization = Optimization(1e-2, weight_decay=0.1, schedule="linear")
    module = Spy(model_path, reward_path, ppo=replace(SETTINGS, critic_warmup=1), optimization=optimization)
    trainer(limit_val_batches=0, max_epochs=4, gradient_clip_val=clip).fit(module, rollout_data())
    rates = [1e-2, 1e-2, 7.5e-3, 7.5e-3, 5e-3, 5e-3, 2.5e-3, 2.5e-3]
    assert logged == pytest.approx(rates[::2])
    start, steps = seen[0], seen[1:]
    assert len(steps) == len(rates)
    for part, first in ((0, 2), (1, 0)):
        weights = [torch.nn.Parameter(p.clone()) for p in start[part]]
        optimizer = torch.optim.AdamW(weights, lr=1.0, eps=1e-5, weight_decay=0.1, fused=True)
        for number, (step, rate) in enumerate(zip(steps, rates, strict=True)):
            if number >= first:
                for p, gradient in zip(weights, step[part][1::2], strict=True):
                    p.grad = gradient
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(weights, step[part][::2], strict=True)), (part, number)
        assert any(gradient.any() for gradient in steps[-1][part][1::2])
    before = torch.cat([p.flatten() for p in start[0]]).double()
    after, gradient = (torch.cat([x.flatten() for x in steps[2][0][n::2]]).double() for n in (0, 1))
    expected = before * (1 - 7.5e-3 * 0.1) - 7.5e-3 * gradient / (gradient.abs() + 1e-5)
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-5)
