"""Each invariant holds on a sound run, and is found broken on a run in which it is broken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.callbacks.findings import INVARIANTS, Finding, tolerance
from rlhf.callbacks.invariants import ExampleCounter, Invariants, fingerprints
from rlhf.errors import UserError
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.modules import Optimization, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.ops.sequences import move_padding
from rlhf.sampling.rollout import Rollout
from rlhf.synthetic.synthesize import SmallModel, create_model

Make = Callable[..., Any]
SETTINGS = PPOSettings(response_length=8, ppo_epochs=2)
FAST = Optimization(learning_rate=1e-3, schedule="constant")


@pytest.fixture
def ppo(model_path: str, reward_path: str, trainer: Make, rollout_data: Make) -> Make:
    """Runs updates of PPO; returns the callback with its findings and what was logged."""

    def ppo(
        module: type[PPOModule] = PPOModule, updates: int = 1, data: Any = None, severity: Any = None, **arguments: Any
    ) -> tuple[Invariants, dict[str, float]]:
        watch = Invariants(**(severity or {}))
        t = trainer(max_epochs=updates, limit_val_batches=0, callbacks=[watch])
        settings = {"model_path": model_path, "reward_path": reward_path, "ppo": SETTINGS, "optimization": FAST}
        t.fit(module(**(settings | arguments)), data or rollout_data())
        return watch, {name: float(value) for name, value in t.callback_metrics.items()}

    return ppo


def centre(reward_path: str, demonstrations: list[list[int]]) -> str:
    """A copy of a reward model, shifted so that these sequences have mean 0."""
    model = ScalarModel.from_pretrained(reward_path, "reward")
    scores = [model.score(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)) for ids in demonstrations]
    model.bias.data -= torch.cat(scores).mean()
    folder = Path(reward_path).with_name("centred")
    model.save(folder, load_tokenizer(reward_path))
    return str(folder)


def test_every_invariant_is_explained_and_can_be_set() -> None:
    assert {field.name for field in fields(Invariants)} == {*INVARIANTS, "highest_kl"}


def test_all_hold_on_a_sound_run_and_are_curves(ppo: Make, rollout_data: Make, reward_path: str) -> None:
    data = rollout_data()
    watch, _ = ppo(data=data)
    rows = data.splits["train"]
    whole = [row["input_ids"] for row in rows if not row["truncated"]]
    watch, metrics = ppo(updates=2, reward_path=centre(reward_path, whole))
    ours = set(INVARIANTS) - {"ranks", "engine"}  # there is one process, and no engine
    assert set(watch.findings) == ours
    assert [f.name for f in watch.findings.values() if not f.holds] == []
    every_update = ours - {"first_kl", "first_value", "padding_side", "demonstration_reward"}
    assert {f"invariants/{name}" for name in every_update} <= metrics.keys()
    assert 0 < metrics["grad_norm"] < 1e3


class OtherTemperature(PPOModule):
    """Learns at another temperature than it measured at."""

    def training_step(self, batch: Rollout, batch_idx: int) -> Tensor:
        self.ppo = replace(self.ppo, temperature=0.9)
        return super().training_step(batch, batch_idx)


def test_a_ratio_that_is_not_one_is_found_before_the_first_step(ppo: Make) -> None:
    with pytest.raises(UserError, match=r"Invariant ratio \(D33\).*trainer.precision"):
        ppo(OtherTemperature, severity={"ratio": "error"})


def test_another_reference_is_no_first_kl(ppo: Make, tmp_path: Path, tokenizer: Any) -> None:
    create_model(tmp_path / "other", tokenizer, SmallModel(32, 2, 2), seed=9)
    watch, _ = ppo(reference_path=str(tmp_path / "other"))
    assert "first_kl" not in watch.findings  # it is not expected to be 0


class OtherStart(PPOModule):
    """Changes policy and critic between loading and training."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        with torch.no_grad():
            self.actor_critic.policy.get_output_embeddings().weight.mul_(1.5)
            self.actor_critic.critic.bias += 0.5

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *args: Any) -> Tensor:
        return torch.tensor([[9, 8, self.tokenizer.eos_token_id, 7]] * len(queries))


def test_models_that_start_elsewhere_are_found(ppo: Make) -> None:
    watch, _ = ppo(OtherStart)
    assert not watch.findings["first_kl"].holds
    assert not watch.findings["first_value"].holds
    assert watch.findings["first_value"].value == pytest.approx(0.5, abs=0.3)
    assert watch.findings["ratio"].holds


def test_a_reward_model_that_is_not_centred_is_found(ppo: Make, reward_path: str, tmp_path: Path) -> None:
    model = ScalarModel.from_pretrained(reward_path, "reward")
    model.bias.data.fill_(50.0)
    model.save(tmp_path / "high", load_tokenizer(reward_path))
    watch, metrics = ppo(reward_path=str(tmp_path / "high"))
    assert metrics["invariants/demonstration_reward"] == pytest.approx(50, abs=5)
    assert not watch.findings["demonstration_reward"].holds


class Fixed(PPOModule):
    """Gives what a good policy would never sample, so that the estimate of the KL is far below 0."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        with torch.no_grad():
            self.actor_critic.policy.get_output_embeddings().weight[5].mul_(-4).sub_(2)

    def sample_responses(self, queries: Tensor, query_mask: Tensor, *args: Any) -> Tensor:
        return torch.full((len(queries), self.ppo.response_length), 5)


def test_a_negative_kl_and_one_beyond_its_ceiling_are_found(ppo: Make) -> None:
    watch, _ = ppo(Fixed)
    mean = watch.findings["kl"].value
    assert mean > watch.findings["kl"].limit
    watch, _ = ppo(
        updates=3, severity={"highest_kl": 1e-9, "kl": "off"}, optimization=replace(FAST, learning_rate=1e-2)
    )
    assert not watch.findings["kl_ceiling"].holds
    assert "kl" not in watch.findings


class BadReward(PPOModule):
    """One reward is not a number."""

    def score_responses(self, episodes: Rollout) -> Tensor:
        scores = super().score_responses(episodes)
        scores[0] = float("nan")
        return scores


def test_a_reward_that_is_no_number_stops_the_run_before_it_is_learnt_from(ppo: Make, reward_path: str) -> None:
    with pytest.raises(UserError, match=r"finite_rewards.*reward_function"):
        ppo(BadReward, ppo=replace(SETTINGS, missing_eos_score=None))


class BadLoss(SFTModule):
    """The third loss is infinite."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 else loss


def test_a_loss_that_is_not_finite_stops_before_the_step(model_path: str, trainer: Make, sft_data: Make) -> None:
    module = BadLoss(model_path, response_length=4, optimization=FAST)
    with pytest.raises(UserError, match="finite"):
        trainer(limit_val_batches=0).fit(module, sft_data())
    assert all(p.isfinite().all() for p in module.parameters())


class DropoutReturns(SFTModule):
    """Something switches dropout on after the first epoch."""

    def on_train_epoch_end(self) -> None:
        self.model.config.hidden_dropout = 0.01


def test_dropout_that_returns_is_found(model_path: str, trainer: Make, sft_data: Make) -> None:
    module = DropoutReturns(model_path, response_length=4)
    with pytest.raises(UserError, match="dropout is on is 1"):
        trainer(limit_val_batches=0, max_epochs=2).fit(module, sft_data())
    assert module.trainer.current_epoch == 1


class Sided(ScalarModel):
    """Reads the column, not the position."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask) + 0.01 * torch.arange(input_ids.shape[1])


@pytest.mark.parametrize("severity", ["error", "warn"])
def test_a_reward_that_depends_on_the_side_of_padding_is_found(
    model_path: str, trainer: Make, preference_data: Make, severity: Any
) -> None:
    module = RewardModule(model_path)
    module.configure_model()
    module.model.__class__ = Sided  # eight columns of padding at least: more than ten times the tolerance
    with pytest.raises(UserError, match="padding_side"):
        trainer(limit_val_batches=0, callbacks=[Invariants(padding_side=severity)]).fit(module, preference_data())


def test_reward_stage_measures_the_shift_after_training(model_path: str, trainer: Make, preference_data: Make) -> None:
    from rlhf.callbacks.export import Export

    watch = Invariants()
    trainer(limit_val_batches=0, callbacks=[Export(), watch]).fit(RewardModule(model_path), preference_data())
    assert watch.findings["demonstration_reward"].value < 1e-4
    assert watch.findings["padding_side"].holds
    assert watch.findings["once_per_epoch"].value == 0


class Twice:
    """A loader that gives its first batch twice and its last one not at all."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        batches = list(self.loader)
        yield from [batches[0], *batches[:-1]]


def test_examples_seen_twice_are_found(model_path: str, trainer: Make, sft_data: Make) -> None:
    data = sft_data()
    loader = data.train_dataloader
    data.train_dataloader = lambda: Twice(loader())
    with pytest.raises(UserError, match=r"once_per_epoch.* 8, above 0"):
        trainer(limit_val_batches=0).fit(SFTModule(model_path, response_length=4), data)


@pytest.mark.parametrize(
    ("seen", "batches", "wrong"), [([0, 1, 2], 3, 0), ([0, 1], 2, 1), ([0, 1], 3, 0), ([0, 0], 3, 1)]
)
def test_too_few_count_only_in_an_epoch_that_was_whole(seen: list[int], batches: int, wrong: int) -> None:
    data = SimpleNamespace(splits={"train": [None] * 3})
    module = SimpleNamespace(kind="sft", device="cpu", reduce_sum=lambda x: x)
    counter = ExampleCounter()
    for _ in range(2):
        counter.start()
        for row in seen:
            counter.add({"rows": [row]})
        trainer = SimpleNamespace(datamodule=data, train_dataloader=range(batches))
        assert counter.count_wrong(trainer, module) == wrong


class Forgets(SFTModule):
    """In the second epoch one batch comes without its rows."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 1 and batch_idx == 1:
            batch["rows"] = []


def test_examples_that_are_missing_in_a_later_epoch_are_found(model_path: str, trainer: Make, sft_data: Make) -> None:
    watch = Invariants(once_per_epoch="warn")
    trainer(limit_val_batches=0, max_epochs=2, callbacks=[watch]).fit(
        Forgets(model_path, response_length=4), sft_data()
    )
    assert watch.findings["once_per_epoch"].value == 4


def test_a_prompt_that_comes_back_too_early_is_found(ppo: Make, rollout_data: Make) -> None:
    data = rollout_data()
    data.prompts_of = lambda update, rank=None: list(range(8))
    with pytest.raises(UserError, match="once_per_epoch"):
        ppo(updates=3, data=data)


def test_fingerprints_tell_single_bits_apart() -> None:
    a = torch.randn(100)
    b = a.clone()
    b[7] = torch.nextafter(b[7], torch.tensor(10.0))
    assert fingerprints([a, a.bfloat16()]).tolist() == fingerprints([a.clone(), a.bfloat16()]).tolist()
    assert fingerprints([a]).tolist() != fingerprints([b]).tolist()


def test_processes_with_other_weights_are_found() -> None:
    """The other process has the first weights throughout."""
    weights = [torch.ones(3), torch.zeros(2)]
    other = fingerprints(weights)
    module = SimpleNamespace(
        device=torch.device("cpu"),
        reduce_max=lambda own: torch.maximum(own, torch.stack([other, -other])),
        log=lambda *args, **settings: None,
    )
    watch, trainer = Invariants(), SimpleNamespace(world_size=2)
    watch._check_ranks(trainer, module, weights)
    for changed in (1.5, 0.5):
        with pytest.raises(UserError, match=r"Invariant ranks \(D12\).*differ is 1,"):
            watch._check_ranks(trainer, module, [torch.full((3,), changed), weights[1]])


def test_a_warning_is_said_once_and_a_value_that_is_no_number_does_not_hold() -> None:
    watch = Invariants()
    finding = Finding("kl", float("nan"), 1.0)
    assert not finding.holds
    with pytest.warns(UserWarning, match="Usual cause"):
        watch.act(Finding("kl", 3.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.act(Finding("kl", 4.0, 1.0))


def test_lower_precision_has_wider_tolerances() -> None:
    names = ("32-true", "16-mixed", "bf16-mixed")
    assert sorted(names, key=lambda n: tolerance(n).ratio) == list(names)


def test_padding_moves_and_nothing_else() -> None:
    ids, mask = torch.tensor([[9, 5, 6, 9], [7, 8, 9, 9]]), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    for side, want in (("left", [[9, 9, 5, 6], [9, 9, 7, 8]]), ("right", [[5, 6, 9, 9], [7, 8, 9, 9]])):
        moved, moved_mask = move_padding(ids, mask, side)
        assert moved.tolist() == want
        assert moved_mask.sum(1).tolist() == [2, 2]
        assert moved[moved_mask.bool()].tolist() == [5, 6, 7, 8]
