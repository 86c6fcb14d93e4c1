"""What each process of a run does, for the estimate of its memory, and the largest micro-batches that fit."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Trainer

from rlhf.errors import UserError
from rlhf.hardware import GIB, device_memory
from rlhf.models.adapter_files import base_name
from rlhf.models.memory import Workload, estimate
from rlhf.protocols import PPOStage, Stage
from rlhf.strategies import Zero2Strategy

if TYPE_CHECKING:
    from rlhf.data.stage_data import StageDataModule

ROOM = 0.85  # of the memory; the rest is for what an estimate does not count


def auto_tokens(trainer: Trainer, module: Stage, data: StageDataModule) -> int:
    """Computes how many tokens per micro-batch, padding included, fit into the memory of every process's device."""
    device = trainer.strategy.root_device
    memory = torch.tensor(-ROOM * device_memory(device, trainer.num_devices), device=device)
    room = -module.reduce_max(memory).item()
    run = workload(trainer, module, data)

    def needed(rows: int) -> int:
        return estimate(module.model_config, replace(run, micro_batch=rows))["training"].total

    share = data.batch_size // (trainer.world_size * data.minibatches)
    rows = bisect_right(range(1, share + 1), room, key=needed)
    if rows < 1:
        raise UserError(
            f"data.max_tokens_per_micro_batch auto: by the estimate {needed(1) / GIB:.1f} GiB are needed for the "
            f"longest example alone, but only {room / GIB:.1f} GiB may be used; docs/memory.md tells what needs less."
        )
    return rows * data.sequences * data.longest()


def workload(trainer: Trainer, module: Stage, data: StageDataModule) -> Workload:
    """Describes what each process does, for the estimate of its memory."""
    longest, strategy, tokens = data.longest(), trainer.strategy, data.tokens
    response = min(module.response_room or data.text.max_response_length, longest - 1)
    extra: dict[str, Any] = {"strategy": "ddp" if trainer.world_size > 1 else "single"}
    if module.kind == "ppo":
        ppo = cast(PPOStage, module)
        reference, reward = ppo.placements
        extra |= {"reference": reference, "reward": reward if ppo.reward_path else None, "critic": ppo.ppo.has_critic}
        if ppo.sampler == "vllm":
            extra |= {"engine_cache_gib": ppo.ppo.vllm_cache_gib, "engine_sleeps": strategy.root_device.type == "cuda"}
        if ppo.reward_path is not None and ppo.lora is not None:
            paths = (ppo.model_path, "model.model_path"), (ppo.reward_path, "model.reward_path")
            extra["bases"] = len({base_name(*path) for path in paths})
    if isinstance(strategy, Zero2Strategy):
        assert strategy.config is not None
        zero = strategy.config["zero_optimization"]
        offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        extra |= {"strategy": "zero2", "offload_optimizer": offloaded, "bucket_size": int(zero["reduce_bucket_size"])}
    return Workload(
        stage=module.kind,
        precision="bf16-mixed" if "16" in trainer.precision else "32-true",
        world_size=trainer.world_size,
        micro_batch=data.micro_batch_size if tokens is None else max(1, tokens // (data.sequences * longest)),
        inference_batch=max(data.rollout_batch_size, data.eval_batch_size),
        query_length=longest - response,
        response_length=response,
        activation_checkpointing=module.activation_checkpointing,
        lora=module.lora,
        quantization=module.quantization,
        **extra,
    )
