"""The models of PPO: checks of all, and the two that are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlhf.data.chat import refuse_conversations
from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.adapters import LoRA
from rlhf.models.classifiers import register_classifier
from rlhf.models.frozen import FrozenModel, M, Placement
from rlhf.models.half_weights import Forward, keep_half, language_model_forward, scalar_forward
from rlhf.models.loading import check_language_model, check_reward_model, checkpoint_activations
from rlhf.models.networks import AdaptedNetworks, Networks
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import (
    PAD_TOKEN,
    check_pad_in_embedding,
    check_reference,
    check_row,
    eos_ids,
    load_tokenizer,
    same_tokens,
)
from rlhf.models.translated import TranslatedModel
from rlhf.modules.settings import PPOSettings
from rlhf.protocols import stage_data
from rlhf.sampling.engines import Sampler, SamplerName, make_sampler
from rlhf.sampling.vllm_sampler import check_temperature
from rlhf.strategies import Zero2Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY, REFERENCE, REWARD = "model.model_path", "model.reference_path", "model.reward_path"


def check_models(
    model_path: str,
    reference_path: str,
    reward_path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    has_critic: bool,
) -> PreTrainedTokenizerBase | None:
    """Refuses models that PPO cannot use together, before any of them is loaded.

    Returns:
        The tokenizer of the reward model if it is another one than that of the policy.
    """
    config = check_language_model(model_path, POLICY)
    check_pad_in_embedding(tokenizer, config, model_path)
    if reference_path != model_path:
        check_reference(reference_path, REFERENCE, tokenizer)
    if reward_path is not None:
        reward_config = check_reward_model(reward_path, REWARD)
        register_classifier(reward_config, REWARD)
        found = load_tokenizer(reward_path, PAD_TOKEN, REWARD)
        same, rows = same_tokens(found, tokenizer), config.get_text_config().vocab_size
        added = found.added_tokens_decoder.keys() - {*eos_ids(found)}  # of which texts hold none
        ids = {id_ for id_ in found.get_vocab().values() if (id_ < rows if same else id_ not in added)}
        ids -= {found.pad_token_id}
        check_row(max(ids), reward_config.get_text_config().vocab_size, found, reward_path, f"{REWARD}: its vocabulary")
        if same:
            return None
    if has_critic:
        register_classifier(config, POLICY)  # refuses types of which there is no critic
    if reward_path is None:
        return None
    critic = ", and the critic starts from the policy's backbone with a new head" if has_critic else ""
    rank_zero_info(
        f"{REWARD}: {reward_path} has another tokenizer than the policy {model_path}: it reads texts that are "
        f"tokenised anew{critic}."
    )
    return found


def check_run(
    trainer: Trainer,
    ppo: PPOSettings,
    placements: tuple[Placement, Placement],
    reward_tokenizer: PreTrainedTokenizerBase | None,
    lora: LoRA | None,
) -> None:
    """Refuses settings that do not go together, and what the Trainer or the data cannot do.

    ZeRO-3 for frozen models needs the process group of DeepSpeed's strategy; conversations need a reward model with the
    tokenizer of the policy, `reward_tokenizer` None; with adapters frozen models share the weights of trained ones.
    """
    ppo.check()
    for name, placement in zip(("reference", "reward"), placements, strict=True):
        if lora is not None and placement != "device":
            raise UserError(
                f"model.{name}_placement is {placement}, but with model.lora the base is in memory once, for all "
                "networks, so there is nothing to move; leave it out."
            )
    for rows in stage_data(trainer).splits.values() if reward_tokenizer is not None else ():
        if len(rows):
            refuse_conversations(rows["record"], REWARD)
    if "zero3" in placements and not isinstance(trainer.strategy, Zero2Strategy):
        raise UserError(
            "model.reference_placement and model.reward_placement zero3 need trainer.strategy zero2; use cpu."
        )


def load_sampler(name: SamplerName, ppo: PPOSettings, own: bool) -> Sampler:
    """Makes the sampler, and refuses settings that it cannot follow; an engine starts when it is first called.

    Args:
        own: whether a subclass samples in its own way, perhaps with an engine of its own.
    """
    if name == "builtin" and ppo.importance_cap is not None and not own:
        raise UserError("model.ppo.importance_cap needs model.sampler vllm: the built-in sampler is the policy itself.")
    if name == "builtin" and ppo.vllm_cache_gib != PPOSettings.vllm_cache_gib and not own:
        raise UserError("model.ppo.vllm_cache_gib is for model.sampler vllm, not for the built-in one; leave it out.")
    if name == "vllm":
        if ppo.cuda_graphs:
            raise UserError("model.ppo.cuda_graphs is for the built-in sampler; leave it out with vllm.")
        for setting in ("temperature", "evaluation_temperature"):
            check_temperature(getattr(ppo, setting), f"model.ppo.{setting}")
    return make_sampler(name, ppo.cuda_graphs, ppo.vllm_cache_gib)


def load_reference(
    networks: Networks, path: str, placement: Placement, half: torch.dtype | None
) -> FrozenModel[PreTrainedModel]:
    """Loads the reference; `half` is the precision of autocast, if it is used under autocast."""
    model = networks.language_model(path, REFERENCE, trained=False)
    return _frozen(networks, model, placement, half, language_model_forward(model))


def load_reward_model(
    networks: Networks,
    path: str,
    placement: Placement,
    half: torch.dtype | None,
    own: PreTrainedTokenizerBase,
    reward: PreTrainedTokenizerBase | None,
) -> FrozenModel[ScalarModel | TranslatedModel]:
    """Loads the reward model for sequences of the policy's tokens; `reward` is its tokenizer if it has another one."""
    model = networks.scalar_model(path, REWARD, trained=False)
    reader = model if reward is None else TranslatedModel(model, own, reward)
    return _frozen(networks, reader, placement, half, scalar_forward(model))


def _frozen(
    networks: Networks, model: M, placement: Placement, half: torch.dtype | None, forward: Forward
) -> FrozenModel[M]:
    frozen = FrozenModel(model, placement)
    if half is not None and not isinstance(networks, AdaptedNetworks):  # a base that is shared has its precision
        keep_half(model.to(networks.device), half, forward)
        if placement == "cpu":
            model.to("cpu")
    return frozen


def load_actor_critic(
    networks: Networks, model_path: str, reward_path: str | None, recompute: bool, has_critic: bool
) -> ActorCritic:
    """Loads the policy, and a critic from the reward model or, if there is none, from the policy's backbone (D24).

    Args:
        recompute: whether activations are computed again in the backward pass.
    """
    start, setting = (model_path, POLICY) if reward_path is None else (reward_path, REWARD)
    critic = networks.scalar_model(start, setting, trained=True) if has_critic else None
    policy = networks.language_model(model_path, POLICY, trained=True)
    if recompute:
        checkpoint_activations(policy)
        if critic is not None:
            checkpoint_activations(critic.model)
    return ActorCritic(policy, critic)
