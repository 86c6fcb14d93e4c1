"""Stages that train adapters: what is exact with all weights is exact with them, and the base never changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import exported, logprobs, scores
from lightning.pytorch.callbacks import ModelCheckpoint
from spies import Spy, Stop, StopAt, fit_with_spy
from torch import Tensor, nn

from rlhf.callbacks.export import write_export
from rlhf.errors import UserError
from rlhf.models.adapters import LoRA
from rlhf.models.loading import load_causal_lm
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import DPOModule, Optimization, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.sampling.rollout import Rollout

Make = Callable[..., Any]
FAST = Optimization(learning_rate=1e-2, schedule="constant", eps=1e-3)
SETTINGS = PPOSettings(response_length=8, ppo_epochs=2)
SMALL = LoRA(rank=4)


@pytest.fixture
def folders(model_path: str, reward_path: str, tmp_path: Path) -> dict[str, str]:
    """The model and reward model of the tests, whole and as adapters."""
    sft = exported(SFTModule(model_path, lora=SMALL), tmp_path / "sft")
    return {
        "whole": model_path, "whole reward": reward_path, "adapter": sft,
        "adapter reward": exported(RewardModule(sft, lora=SMALL), tmp_path / "reward"),
    }  # fmt: skip


@pytest.fixture
def run(trainer: Make, rollout_data: Make) -> Make:
    """Trains a PPOModule; returns what the spy saw."""

    def run(module: PPOModule, max_epochs: int = 2, callbacks: Any = (), **fit: Any) -> Spy:
        return fit_with_spy(trainer, module, rollout_data(), max_epochs, callbacks, fit)

    return run


def trained(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def base(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if not p.requires_grad])


@pytest.mark.parametrize(("model", "reward"), [
    ("whole", "whole reward"), ("adapter", "adapter reward"), ("whole", "adapter reward"), ("adapter", "whole reward"),
])  # fmt: skip
def test_the_invariants_of_ppo_are_exact(run: Make, folders: dict[str, str], model: str, reward: str) -> None:
    class Ends(PPOModule):
        def sample_responses(self, *inputs: Any) -> Tensor:
            responses = super().sample_responses(*inputs)
            responses[:, 3] = self.tokenizer.eos_token_id
            return responses

    module = Ends(folders[model], folders[reward], ppo=SETTINGS, optimization=FAST, lora=SMALL)
    module.configure_model()
    before, start = base(module).clone(), trained(module).clone()
    spy = run(module)
    assert [m["val/ratio_max_deviation"] for m in spy.metrics] == [0, 0]
    assert torch.equal(spy.rollouts[0].kl, torch.zeros_like(spy.rollouts[0].kl))
    assert spy.rollouts[1].kl.abs().max() > 1e-3
    first = spy.rollouts[0]
    assert first.has_eos.all()
    rows = torch.arange(len(first))
    torch.testing.assert_close(first.values[rows, first.lengths], first.scores, atol=1e-5, rtol=0)
    assert torch.equal(base(module), before)
    assert (trained(module) - start).abs().max() > 1e-3


class ByHand(nn.Module):
    """x W' + b + alpha / rank x A' B', written out."""

    def __init__(self, linear: nn.Linear, a: Tensor) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(a.new_zeros(len(linear.weight), len(a)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 32 / 4 * (x @ self.a.T) @ self.b.T


def test_an_update_is_that_of_the_parametrisation_written_out(run: Make, folders: dict[str, str]) -> None:
    arguments: Any = (folders["whole"], folders["whole reward"])
    ours = PPOModule(*arguments, ppo=SETTINGS, optimization=FAST, lora=SMALL)
    ours.configure_model()
    start = {name: p.detach().clone() for name, p in ours.actor_critic.named_parameters()}

    class Theirs(PPOModule):
        def configure_model(self) -> None:
            super().configure_model()
            for name in [n.removesuffix(".lora_A.default.weight") for n in start if "lora_A" in n]:
                parent, _, last = name.rpartition(".")
                linear = self.actor_critic.get_submodule(name)
                made = ByHand(linear, start[f"{name}.lora_A.default.weight"])
                setattr(self.actor_critic.get_submodule(parent), last, made)
            for name, p in self.actor_critic.named_parameters():
                p.requires_grad_(name.endswith((".a", ".b", "score.weight", "critic.bias")))

    theirs = Theirs(*arguments, ppo=SETTINGS, optimization=FAST)
    run(ours)
    run(theirs)
    found = dict(ours.actor_critic.named_parameters())
    compared = 0
    for name, expected in theirs.actor_critic.named_parameters():
        if expected.requires_grad:
            name, _, last = name.rpartition(".")
            key = f"{name}.lora_{last.upper()}.default.weight" if last in "ab" else f"{name}.{last}"
            torch.testing.assert_close(found[key], expected, atol=2e-5, rtol=0, msg=name)
            compared += 1
    assert compared == sum(p.requires_grad for p in ours.parameters()) == 2 * 2 * 8 + 2


def test_the_reference_is_a_separate_copy_also_after_an_exception(
    run: Make, folders: dict[str, str], rollout_data: Make
) -> None:
    class StopsError(Exception):
        pass

    class Stops(PPOModule):
        def score_responses(self, episodes: Rollout) -> Tensor:
            if self.trainer.current_epoch == 1:
                raise StopsError
            return super().score_responses(episodes)

    module = Stops(folders["adapter"], folders["adapter reward"], ppo=SETTINGS, optimization=FAST, lora=SMALL)
    with pytest.raises(StopsError):
        run(module)
    with module.reference.on(torch.device("cpu")) as reference:
        expected = logprobs(load_causal_lm(folders["adapter"]))
        torch.testing.assert_close(logprobs(reference), expected, atol=1e-5, rtol=0)
    assert (logprobs(module.actor_critic.policy) - expected).abs().max() > 1e-2  # it has learnt, and has its adapter


def test_a_resumed_run_equals_one_that_never_stopped(run: Make, folders: dict[str, str], tmp_path: Path) -> None:
    def module(**more: Any) -> PPOModule:
        settings: dict[str, Any] = {"ppo": SETTINGS, "optimization": FAST, "lora": SMALL, **more}
        return PPOModule(folders["adapter"], folders["adapter reward"], **settings)

    whole = module()
    run(whole, max_epochs=4)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_on_train_epoch_end=True)
    with pytest.raises(Stop):
        run(module(), max_epochs=4, callbacks=[checkpoint, StopAt(2)])
    path = checkpoint.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert sum(x.numel() for x in state.values()) == len(trained(whole))
    resumed = module()
    run(resumed, max_epochs=4, ckpt_path=path)
    assert torch.equal(trained(resumed), trained(whole))
    with pytest.raises(UserError, match=r"does not fit PPOModule and its model\.lora"):
        run(module(lora=None), max_epochs=4, ckpt_path=path)
    with pytest.raises(
        UserError, match=r"modules_to_save is \['embed_in'\], and the adapter .* trains further has \[\]"
    ):
        module(lora=LoRA(rank=4, modules_to_save=["embed_in"]))


@pytest.mark.parametrize("more", [{}, {"rslora": True}, {"dora": True}, {"modules_to_save": ["embed_in"]}])
def test_policy_and_critic_export_what_they_compute(
    run: Make, folders: dict[str, str], tmp_path: Path, more: dict[str, Any]
) -> None:
    lora = LoRA(rank=4, **more)
    module = PPOModule(folders["whole"], folders["whole reward"], ppo=SETTINGS, optimization=FAST, lora=lora)
    run(module, max_epochs=1)
    write_export(module, tmp_path / "ppo")
    policy = load_causal_lm(str(tmp_path / "ppo"))
    torch.testing.assert_close(logprobs(policy), logprobs(module.actor_critic.policy), atol=2e-5, rtol=0)
    critic = ScalarModel.from_pretrained(str(tmp_path / "ppo" / "critic"), "critic")
    torch.testing.assert_close(scores(critic), scores(module.actor_critic.critic), atol=2e-5, rtol=0)
    assert (logprobs(policy) - logprobs(load_causal_lm(folders["whole"]))).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_other_stages_learn_with_the_base_as_it_was(
    trainer: Make, sft_data: Make, preference_data: Make, model_path: str, precision: str
) -> None:
    for kind, data in ((SFTModule, sft_data()), (RewardModule, preference_data()), (DPOModule, preference_data())):
        module: Any = kind(model_path, optimization=FAST, lora=SMALL, activation_checkpointing=True)
        trainer(max_epochs=1, precision=precision, limit_val_batches=0).fit(module, data)
        whole = load_causal_lm(model_path).get_input_embeddings().weight
        network = module.model.model if kind is RewardModule else module.model
        assert torch.equal(network.get_input_embeddings().weight, whole)
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
        moved = [p for name, p in module.named_parameters() if "lora_B" in name]
        assert all(p.abs().max() > 0 for p in moved)


def test_nothing_is_moved_where_the_base_is_shared(run: Make, folders: dict[str, str]) -> None:
    for name in ("reference", "reward"):
        placement: Any = {f"{name}_placement": "cpu"}
        with pytest.raises(UserError, match=rf"model\.{name}_placement is cpu, but with model\.lora the base"):
            run(PPOModule(folders["whole"], folders["whole reward"], lora=SMALL, **placement))
