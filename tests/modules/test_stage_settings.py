"""Settings outside of `model.ppo` do what they say: optimizer, schedule, clipping, losses, sampling, padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.sampling.rollout import Rollout

Make = Callable[..., Any]
PPO = PPOSettings(response_length=6, ppo_epochs=1)
STAGES = ["SFT", "reward", "PPO"]


class Steps(Callback):
    """What was given to every optimizer step, and what came out of it."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.gradients: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        parameters = list(pl_module.parameters())
        self.weights.append(torch.cat([p.detach().flatten() for p in parameters]).cpu())

        def after(optimizer: Any, *args: Any) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]).cpu())
            self.weights.append(torch.cat([p.detach().flatten() for p in parameters]).cpu())

        trainer.optimizers[0].register_step_post_hook(after)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(move_data_to_device(batch, "cpu"))
        self.losses.append(outputs["loss"].item())  # over the number of micro-batches of its step


@pytest.fixture
def fit(
    model_path: str, reward_path: str, trainer: Make, sft_data: Make, preference_data: Make, rollout_data: Make
) -> Make:
    """Trains a stage; what its steps were, the module, and the data."""

    def fit(
        stage: str, optimization: Optimization = Optimization(), data: Any = None, module: Any = None, **settings: Any
    ) -> tuple[Steps, Any, Any]:
        steps = Steps()
        if stage == "SFT":
            module, data = module or SFTModule(model_path, optimization=optimization), sft_data(**(data or {}))
        elif stage == "reward":
            module, data = RewardModule(model_path, 0.1, optimization), preference_data(**(data or {}))
        else:
            module = module or PPOModule(model_path, reward_path, ppo=PPO, optimization=optimization)
            data = rollout_data(**(data or {}))
        trainer(limit_val_batches=0, callbacks=[steps], **settings).fit(module, data)
        return steps, module, data

    return fit


# ----------------------------------------------------------------------------------------------------- optimization


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_that_of_adamw_with_these_settings(fit: Make, stage: str) -> None:
    steps, _, _ = fit(stage, Optimization(1e-2, eps=3e-3, weight_decay=0.5, schedule="constant"))
    before, after, gradient = steps.weights[0].double(), steps.weights[1].double(), steps.gradients[0].double()
    expected = before * (1 - 1e-2 * 0.5) - 1e-2 * gradient / (gradient.abs() + 3e-3)  # in the first step
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-5)
    assert (gradient.abs() > 1e-3).any()


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("constant", lambda done: 1),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_learning_rate_follows_its_schedule(
    fit: Make, model_path: str, reward_path: str, schedule: Any, share: Callable[[float], float], warmup: int
) -> None:
    optimization = Optimization(1e-3, schedule=schedule, warmup_steps=warmup)
    total = 4
    steps, _, _ = fit("SFT", optimization)  # steps
    two_steps = PPOModule(model_path, reward_path, ppo=replace(PPO, ppo_epochs=2), optimization=optimization)
    updates, _, _ = fit("PPO", module=two_steps, max_epochs=total)
    expected = [1e-3 * (n / warmup if n < warmup else share((n - warmup) / (total - warmup))) for n in range(total)]
    assert steps.rates == pytest.approx(expected)
    assert updates.rates == pytest.approx([rate for rate in expected for _ in range(2)])
    assert torch.equal(updates.weights[0], updates.weights[1]) == (warmup > 0)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped(fit: Make, stage: str) -> None:
    free = fit(stage)[0].gradients[0]
    norm = free.norm().item()
    loose, tight, by_value = (
        fit(stage, **clipping)[0].gradients[0]
        for clipping in (
            {"gradient_clip_val": 2 * norm},
            {"gradient_clip_val": norm / 3},
            {"gradient_clip_val": norm / 100, "gradient_clip_algorithm": "value"},
        )
    )
    assert torch.equal(loose, free)
    torch.testing.assert_close(tight, free / 3, atol=1e-7, rtol=1e-4)
    assert tight.norm().item() == pytest.approx(norm / 3, rel=1e-4)
    assert torch.equal(by_value, free.clamp(-norm / 100, norm / 100))
    assert not torch.equal(by_value, free)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_in_mixed_precision_too(fit: Make, stage: str) -> None:
    # Lightning refuses to clip the gradients of a fused optimizer there.
    norm = fit(stage, precision="bf16-mixed")[0].gradients[0].norm().item()
    clipped = fit(stage, precision="bf16-mixed", gradient_clip_val=norm / 3)[0].gradients[0]
    assert clipped.norm().item() == pytest.approx(norm / 3, rel=1e-3)


@pytest.mark.parametrize(("stage", "passes"), [("SFT", 1), ("reward", 1), ("PPO", 3)])
@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_micro_batches_make_no_steps_of_their_own(
    fit: Make, model_path: str, reward_path: str, stage: str, passes: int, micro_batch_size: int
) -> None:
    module = PPOModule(model_path, reward_path, ppo=replace(PPO, ppo_epochs=passes)) if stage == "PPO" else None
    steps, _, data = fit(stage, data={"micro_batch_size": micro_batch_size}, module=module)
    count = passes if stage == "PPO" else len(data.splits["train"]) // 8
    assert len(steps.gradients) == count
    assert len(steps.batches) == count * 8 // micro_batch_size


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("reduction", ["minibatch", "microbatch"])
def test_the_gradient_of_sft_is_that_of_plain_transformers(
    fit: Make, model_path: str, loss_on: Any, reduction: Any
) -> None:
    module = SFTModule(model_path, loss_on, optimization=Optimization(loss_reduction=reduction))
    steps, _, data = fit("SFT", module=module, data={"micro_batch_size": 2})
    starts = {tuple(row["input_ids"]): row["response_start"] for row in data.splits["train"]}
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    losses, counts = [], []
    for batch in steps.batches[:4]:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row in labels:
            row[: starts[tuple(row[row >= 0].tolist())] if loss_on == "response" else 0] = -100
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        losses.append(model(**inputs, labels=labels).loss)
        counts.append(int((labels[:, 1:] >= 0).sum()))
    of_all = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    of_each = sum(losses) / len(losses)
    loss = of_all if reduction == "minibatch" else of_each
    assert abs(of_all - of_each) > 1e-4
    assert sum(steps.losses[:4]) == pytest.approx(loss.item(), abs=1e-5)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(steps.gradients[0], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("reduction", ["minibatch", "microbatch"])
def test_the_loss_of_ppo_is_over_tokens_of_all_or_of_each_micro_batch(
    fit: Make, model_path: str, reward_path: str, reduction: Any
) -> None:
    class Spy(PPOModule):
        seen: list[tuple[Tensor, Tensor, Tensor]]

        def loss(self, now: Any, batch: Rollout) -> Any:
            loss, statistics = super().loss(now, batch)
            (policy, mask), (value, value_mask) = statistics["loss/policy_avg"], statistics["loss/value_avg"]
            self.seen = [*getattr(self, "seen", []), (policy[mask], value[value_mask])]
            return loss, statistics

        def sample_responses(self, queries: Tensor, *args: Any) -> Tensor:
            self.given = getattr(self, "given", 0) + len(queries)
            lengths = torch.arange(self.given - len(queries), self.given, device=queries.device) % 6
            columns = torch.arange(6, device=queries.device)
            return torch.where(columns == lengths[:, None], self.tokenizer.eos_token_id, 5)

    module = Spy(model_path, reward_path, ppo=PPO, optimization=Optimization(loss_reduction=reduction))
    steps, _, _ = fit("PPO", module=module, data={"micro_batch_size": 2})
    policy, value = zip(*module.seen, strict=True)
    of_all = torch.cat(policy).mean() + 0.1 * torch.cat(value).mean()
    of_each = torch.stack([p.mean() + 0.1 * v.mean() for p, v in zip(policy, value, strict=True)]).mean()
    expected = of_all if reduction == "minibatch" else of_each
    assert sum(steps.losses) == pytest.approx(expected.item(), abs=1e-6)
    assert abs(of_all - of_each) > 1e-4


@pytest.mark.parametrize("reduction", ["minibatch", "microbatch"])
@pytest.mark.parametrize("centering", [0.0, 0.5])
def test_the_loss_of_the_reward_model_is_over_pairs_of_all_or_of_each_micro_batch(
    model_path: str, trainer: Make, preference_data: Make, reduction: Any, centering: float
) -> None:
    steps = Steps()
    still = Optimization(1e-12, loss_reduction=reduction)  # so that all rewards are those of the start
    module = RewardModule(model_path, centering, still)
    trainer(limit_val_batches=0, callbacks=[steps]).fit(module, preference_data(batch_size=15, micro_batch_size=3))
    model = ScalarModel.from_policy(model_path, 7)  # the head of the run's seed
    losses = []
    for batch in steps.batches[5:]:  # the last step: 9 pairs in 5 micro-batches
        pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        chosen, rejected = torch.stack([model.score(i[m][None], m[m][None].long())[0] for i, m in pairs]).chunk(2)
        losses.append(-F.logsigmoid(chosen - rejected) + centering * (chosen + rejected) ** 2)
    assert sorted(map(len, losses)) == [1, 2, 2, 2, 2]
    of_all, of_each = torch.cat(losses).mean(), torch.stack([loss.mean() for loss in losses]).mean()
    expected = of_all if reduction == "minibatch" else of_each
    assert sum(steps.losses[5:]) == pytest.approx(expected.item(), abs=1e-5)
    assert abs(of_all - of_each) > 1e-4


# --------------------------------------------------------------------------------------------- sampling and padding


def greedy(path: str, queries: list[str], length: int) -> list[str]:
    """What plain transformers decodes."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = []
    for query in queries:
        ids = tokenizer(query, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(("temperature", "is_greedy"), [(1e-6, True), (0.7, False)])
def test_samples_of_sft_have_their_temperature_and_length(
    model_path: str, trainer: Make, sft_data: Make, temperature: float, is_greedy: bool
) -> None:
    module = SFTModule(model_path, temperature=temperature, response_length=7)
    rows = trainer(limit_predict_batches=1).predict(module, sft_data(eval_batch_size=4))[0]
    expected = greedy(model_path, [row["query"] for row in rows], 7)
    assert ([row["response"] for row in rows] == expected) == is_greedy


@pytest.mark.parametrize("cold", ["temperature", "evaluation_temperature"])
def test_rollout_and_validation_of_ppo_have_each_their_temperature(
    fit: Make, trainer: Make, model_path: str, reward_path: str, cold: str
) -> None:
    ppo = replace(PPO, **({"temperature": 2.0, "evaluation_temperature": 2.0} | {cold: 1e-6}))
    _, module, data = fit("PPO", module=PPOModule(model_path, reward_path, ppo=ppo))
    module.actor_critic = None  # back to the policy before the update
    predicted = trainer().predict(module, data)[0]
    for name, rows in (("temperature", data.last_rollout.texts), ("evaluation_temperature", predicted)):
        expected = greedy(model_path, [row["query"] for row in rows], 6)
        assert ([row["response"] for row in rows] == expected) == (name == cold)


@pytest.mark.parametrize("length", [3, 8])
def test_responses_of_ppo_have_at_most_their_length(fit: Make, model_path: str, reward_path: str, length: int) -> None:
    _, _, data = fit("PPO", module=PPOModule(model_path, reward_path, ppo=replace(PPO, response_length=length)))
    assert data.last_rollout.responses.shape == (8, length)
    assert data.last_rollout.lengths.max() == length


def test_a_pad_token_pads_and_changes_no_number(model_path: str, trainer: Make, sft_data: Make, batch_of: Make) -> None:
    losses = []
    for pad in (None, "[OTHER]"):
        module, data = SFTModule(model_path, pad_token=pad, response_length=2), sft_data()
        losses.append(trainer().validate(module, data, verbose=False)[0]["validation/loss"])
        batch = batch_of(data, "validation", [0, 1, 2, 3])
        padding = batch["input_ids"][batch["attention_mask"] == 0]
        assert set(padding.tolist()) == {module.tokenizer.convert_tokens_to_ids(pad or "[PAD]")}
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", ["reward", "PPO"])
def test_every_parameter_begins_where_16_bytes_of_bfloat16_do(fit: Make, stage: str) -> None:
    """DeepSpeed puts those of a group behind one another; the bias of a scalar model is a single number."""
    _, module, _ = fit(stage)
    for group in module.trainer.optimizers[0].param_groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        assert len(sizes) > 20
        assert all(sum(sizes[:place]) % 8 == 0 for place in range(len(sizes)))
