from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spies import Spy, Stop, StopAt, fit_with_spy
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.callbacks.export import Export
from rlhf.errors import UserError
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings
from rlhf.sampling.rollout import Rollout

Make = Callable[..., Any]
FAST = Optimization(learning_rate=1e-3, schedule="linear")
SETTINGS = PPOSettings(response_length=8, ppo_epochs=2)


def number_of_words(queries: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    assert all(record["post"] in query for query, record in zip(queries, records, strict=True))
    return [float(len(response.split())) for response in responses]


def weights(module: PPOModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def run(model_path: str, reward_path: str, trainer: Make, rollout_data: Make) -> Make:
    """Trains a PPOModule; returns it and what the spy saw."""

    def run(
        module: PPOModule | None = None, data: Any = None, max_epochs: int = 2, callbacks: Any = (), **fit: Any
    ) -> tuple[PPOModule, Spy]:
        module = module or PPOModule(model_path, reward_path, ppo=SETTINGS, optimization=FAST)
        return module, fit_with_spy(trainer, module, data or rollout_data(), max_epochs, callbacks, fit)

    return run


def test_ratio_is_one_before_the_first_step_and_the_first_kl_is_zero(run: Make) -> None:
    _, spy = run(max_epochs=3)
    assert len(spy.metrics) == 3
    assert all(m["val/ratio_max_deviation"] < 1e-5 for m in spy.metrics)
    assert spy.metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert spy.rollouts[-1].kl.abs().max() > 1e-3  # and later it is not


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_an_update_does_not_depend_on_the_micro_batch_size(
    run: Make, rollout_data: Make, micro_batch_size: int
) -> None:
    expected, _ = run(data=rollout_data(), max_epochs=1)
    actual, _ = run(data=rollout_data(micro_batch_size=micro_batch_size), max_epochs=1)
    torch.testing.assert_close(weights(actual), weights(expected), atol=2e-5, rtol=0)


def test_a_resumed_run_equals_one_that_never_stopped(run: Make, tmp_path: Path) -> None:
    expected, spy = run(max_epochs=4)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_on_train_epoch_end=True)
    with pytest.raises(Stop):
        run(max_epochs=4, callbacks=[checkpoint, StopAt(2)])
    resumed, after = run(max_epochs=4, ckpt_path=checkpoint.best_model_path)
    assert torch.equal(weights(resumed), weights(expected))
    assert torch.equal(after.rollouts[-1].responses, spy.rollouts[-1].responses)
    assert after.metrics[-1]["objective/kl"] == spy.metrics[-1]["objective/kl"]


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_a_ratio_on_either_side_of_one_is_a_deviation(
    run: Make, model_path: str, reward_path: str, shift: float
) -> None:
    class Shifted(PPOModule):
        def training_step(self, batch: Rollout, batch_idx: int) -> Tensor:
            batch.logprobs = batch.logprobs - shift
            return super().training_step(batch, batch_idx)

    _, spy = run(Shifted(model_path, reward_path, ppo=SETTINGS), max_epochs=1)
    assert spy.metrics[0]["val/ratio_max_deviation"] == pytest.approx(abs(np.exp(shift) - 1), abs=1e-4)


def test_missing_eos_is_penalised(run: Make) -> None:
    _, spy = run(max_epochs=1)
    rollout = spy.rollouts[0]
    assert (~rollout.has_eos).any()
    assert (rollout.scores[~rollout.has_eos] == -1).all()


@pytest.mark.parametrize("alone", [True, False])
def test_reward_function(run: Make, model_path: str, reward_path: str, alone: bool) -> None:
    settings = replace(SETTINGS, missing_eos_score=None)
    path = None if alone else reward_path
    module = PPOModule(model_path, path, number_of_words, ppo=settings, optimization=FAST)
    _, spy = run(module, max_epochs=1)
    rollout = spy.rollouts[0].to("cpu")
    words = torch.tensor([float(len(text["response"].split())) for text in rollout.texts])
    if alone:
        assert torch.equal(rollout.scores, words)
    else:
        ids = torch.cat([rollout.queries, rollout.responses], 1)
        mask = torch.cat([rollout.query_mask, rollout.mask.long()], 1)
        model = ScalarModel.from_pretrained(reward_path, "model")
        torch.testing.assert_close(rollout.scores, words + model.score(ids, mask).detach(), atol=1e-4, rtol=0)


def test_a_reward_function_is_called_once_per_rollout_with_all_its_episodes(
    run: Make, rollout_data: Make, model_path: str, reward_path: str
) -> None:
    called: list[int] = []

    def ranked(queries: list[str], responses: list[str]) -> Any:  # depends on the responses beside it
        called.append(len(responses))
        return np.argsort(np.argsort([hash(response) for response in responses])).reshape(-1, 1)

    settings = replace(SETTINGS, missing_eos_score=None)
    module = PPOModule(model_path, None, ranked, ppo=settings, optimization=FAST)
    _, spy = run(module, rollout_data(rollout_batch_size=1))
    assert called == [8, 8]
    assert sorted(spy.rollouts[0].scores.tolist()) == list(range(8))


def test_filtered_episodes_teach_nothing(run: Make, model_path: str, reward_path: str) -> None:
    class KeepNone(PPOModule):
        def keep_episodes(self, episodes: Rollout) -> Tensor:
            return torch.zeros(len(episodes), dtype=torch.bool)

    still = replace(FAST, weight_decay=0.0)
    module = KeepNone(model_path, reward_path, ppo=SETTINGS, optimization=still)
    module.configure_model()
    before = weights(module)
    run(module, max_epochs=1)
    assert torch.equal(weights(module), before)


def test_it_learns_a_simple_reward(run: Make, model_path: str, rollout_data: Make) -> None:
    def letter_e(queries: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
        return [float(response.count("e")) for response in responses]

    settings = replace(SETTINGS, missing_eos_score=None, kl_coefficient=0.0, ppo_epochs=4)
    module = PPOModule(model_path, None, letter_e, ppo=settings, optimization=replace(FAST, learning_rate=1e-2))
    _, spy = run(module, rollout_data(batch_size=32, micro_batch_size=32, rollout_batch_size=32), max_epochs=15)
    scores = [m["objective/scores"] for m in spy.metrics]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 2


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused(
    run: Make, model_path: str, reward_path: str
) -> None:
    module = PPOModule(model_path, reward_path, ppo=replace(SETTINGS, kl_target=1.0, kl_horizon=1))
    with pytest.raises(UserError, match=r"kl_horizon is 1.*data.batch_size 8"):
        run(module)


def test_adaptive_kl_coefficient_moves_and_is_kept(
    run: Make, model_path: str, reward_path: str, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, kl_target=100.0, kl_horizon=80)
    module = PPOModule(model_path, reward_path, ppo=settings, optimization=FAST)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_on_train_epoch_end=True)
    run(module, max_epochs=2, callbacks=[checkpoint])
    # kl far below its target: the error is clipped at -0.2, so every update multiplies by 1 - 0.2 x 8 / 80
    assert module.kl_control.coefficient == pytest.approx(0.05 * 0.98**2)
    again = PPOModule(model_path, reward_path, ppo=settings, optimization=FAST)
    run(again, max_epochs=2, ckpt_path=checkpoint.best_model_path)
    assert again.kl_control.coefficient == pytest.approx(0.05 * 0.98**2)


def test_the_adaptive_coefficient_follows_the_kl_and_the_number_of_the_episodes_of_all_processes(
    model_path: str, reward_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, kl_coefficient=0.05, kl_target=2.0 / 1.1, kl_horizon=80)
    module: Any = PPOModule(model_path, reward_path, ppo=settings)
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    own = SimpleNamespace(kl=torch.full((4, 2), 0.5))  # this process: 4 of 8 episodes, of a KL of 1; the other one: 3
    data = SimpleNamespace(last_rollout=own, batch_size=8)
    module._trainer = SimpleNamespace(world_size=2, optimizers=[optimizer], datamodule=data)
    module.ratio_deviation = torch.zeros(())
    module.epoch_means = SimpleNamespace(pop=lambda reduce_sum: {})
    for name in ("log", "log_dict"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
    module.reduce_sum = lambda x: x + 3.0
    module.on_train_epoch_end()
    assert module.kl_control.coefficient == pytest.approx(0.05 * (1 + 0.1 * 8 / 80))


def test_learning_rate_falls_linearly_once_per_update(run: Make) -> None:
    _, spy = run(max_epochs=4)
    assert [m["lr"] for m in spy.metrics] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_curves(run: Make) -> None:
    _, spy = run(max_epochs=1)
    rollout, metrics = spy.rollouts[0], spy.metrics[0]
    assert metrics["objective/scores"] == pytest.approx(rollout.scores.mean().item(), abs=1e-5)
    assert metrics["rollout/eos_share"] == pytest.approx(rollout.has_eos.float().mean().item())
    assert metrics["episode"] == 8
    names = (
        "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "policy/approxkl_avg",
        "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg",
        "val/ratio", "val/ratio_var", "val/num_eos_tokens", "eps", "memory/peak_gib", "seconds/sampling",
    )  # fmt: skip
    assert set(names) <= set(metrics)


def test_statistics_are_means_over_the_tokens_of_an_update(
    run: Make, model_path: str, reward_path: str, rollout_data: Make
) -> None:
    """However the tokens are spread over micro-batches."""

    class Uneven(PPOModule):
        def sample_responses(self, queries: Tensor, *args: Any) -> Tensor:
            ends, columns = (queries.sum(1) % 8).unsqueeze(1), torch.arange(8, device=queries.device)
            return torch.where(columns == ends, self.tokenizer.eos_token_id, 5)

    found = []
    for size in (1, 8):
        module = Uneven(model_path, reward_path, ppo=replace(SETTINGS, ppo_epochs=1), optimization=FAST)
        _, spy = run(module, rollout_data(micro_batch_size=size, rollout_batch_size=8), max_epochs=1)
        assert len(set(spy.rollouts[0].lengths.tolist())) > 2
        found.append(
            {name: spy.metrics[0][name] for name in ("policy/entropy_avg", "loss/policy_avg", "loss/value_avg")}
        )
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_validation_is_on_the_whole_subset(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make
) -> None:
    module = PPOModule(model_path, reward_path, evaluation_function=number_of_words, ppo=SETTINGS)
    seen: list[str] = []
    respond = module.respond

    def spy(batch: dict[str, Any], seed: int) -> Rollout:
        seen.extend(text["query"] for text in batch["texts"])
        return respond(batch, seed)

    module.respond = spy  # type: ignore[method-assign]
    metrics = trainer().validate(module, rollout_data(eval_batch_size=4), verbose=False)[0]
    assert len(seen) == len(set(seen)) == 6
    assert {"validation/score", "validation/eos", "validation/length", "validation/number_of_words"} <= set(metrics)


def test_exports_load_in_plain_transformers(run: Make, tmp_path: Path) -> None:
    module, _ = run(max_epochs=1, callbacks=[Export()])
    folder = tmp_path / "run" / "export"
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(policy(ids).logits, module.actor_critic.policy(ids).logits)
    ours = module.actor_critic.critic.score(ids, torch.ones_like(ids))
    torch.testing.assert_close(critic(ids).logits[:, 0] - critic.config.reward_shift, ours)


def test_frozen_models_are_in_no_checkpoint(run: Make, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_on_train_epoch_end=True)
    module, _ = run(max_epochs=1, callbacks=[checkpoint])
    names = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in names} == {"policy", "critic"}
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"actor_critic"}


class TestBadInput:
    def test_no_reward(self, model_path: str) -> None:
        with pytest.raises(UserError, match="no reward"):
            PPOModule(model_path)

    def test_reward_model_is_a_language_model(self, run: Make, model_path: str) -> None:
        with pytest.raises(UserError, match="not a reward model"):
            run(PPOModule(model_path, model_path))

    @pytest.mark.parametrize("batch_size", [7, 64])
    def test_batch_that_does_not_fit(self, run: Make, rollout_data: Make, batch_size: int) -> None:
        with pytest.raises(UserError, match=r"data\.batch_size"):
            run(data=rollout_data(batch_size=batch_size))

    def test_a_reward_model_that_gives_no_numbers(
        self, model_path: str, reward_path: str, trainer: Make, rollout_data: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ScalarModel, "score", lambda self, ids, mask: torch.full((len(ids),), torch.nan))
        with pytest.raises(UserError, match=r"rewards by model\.reward_path .* are NaN or infinite"):
            trainer().validate(PPOModule(model_path, reward_path, ppo=SETTINGS), rollout_data())

    def test_reward_function_of_wrong_length(self, run: Make, model_path: str) -> None:
        with pytest.raises(UserError, match="rewards for"):
            run(PPOModule(model_path, None, lambda q, r, s: [1.0] * 1000, ppo=SETTINGS))
