"""What each process of a run does, as the estimate of its memory wants it, and the largest micro-batches that fit."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import replace
from typing import Any

import torch

from rlhf.errors import UserError
from rlhf.models.memory import Workload, estimate
from rlhf.strategies import Zero2Strategy

ROOM = 0.85  # of the memory; the rest is for what an estimate does not count


def auto_tokens(trainer: Any, module: Any, data: Any) -> int:
    """Tokens per micro-batch, padding included, that fit into the memory of every process's device.

    Raises:
        UserError: not even the longest example fits.
    """
    device = trainer.strategy.root_device
    memory = torch.tensor(-ROOM * device_memory(device, trainer.num_devices), device=device)
    room = -module.reduce_max(memory).item()
    run = workload(trainer, module, data)

    def needed(rows: int) -> int:
        return estimate(module.model_config, replace(run, micro_batch=rows)).phases["training"].total

    share = data.batch_size // (trainer.world_size * data.minibatches)
    rows = bisect_right(range(1, share + 1), room, key=needed)
    if rows < 1:
        raise UserError(
            f"data.max_tokens_per_micro_batch auto: by the estimate {needed(1) / 2**30:.1f} GiB are needed for the "
            f"longest example alone, but only {room / 2**30:.1f} GiB may be used; docs/memory.md tells what needs less."
        )
    return rows * rows_per_example(module) * int(data.longest())


def device_memory(device: torch.device, processes: int) -> int:
    """Bytes of a GPU; of the machine's memory the part of one of its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def rows_per_example(module: Any) -> int:
    """Sequences of an example: a comparison has two."""
    return 2 if module.kind == "reward" else 1


def workload(trainer: Any, module: Any, data: Any) -> Workload:
    """What each process does, for the estimate of its memory."""
    ppo = module.kind == "ppo"
    longest = data.longest()
    response = min(module.response_room or data.text.max_response_length, longest - 1)
    placements = {"reference": module.reference_placement, "reward": module.reward_placement} if ppo else {}
    if ppo and module.reward_path is None:
        placements["reward"] = None
    micro_batch = data.micro_batch_size
    if data.tokens is not None:
        micro_batch = max(1, data.tokens // (rows_per_example(module) * longest))
    zero2 = isinstance(trainer.strategy, Zero2Strategy)
    return Workload(
        stage=module.kind,
        strategy="zero2" if zero2 else "ddp" if trainer.world_size > 1 else "single",
        precision="bf16-mixed" if "16" in trainer.precision else "32-true",
        world_size=trainer.world_size,
        micro_batch=micro_batch,
        inference_batch=max(data.rollout_batch_size if ppo else 1, data.eval_batch_size),
        query_length=longest - response,
        response_length=response,
        activation_checkpointing=module.activation_checkpointing,
        **(zero2_settings(trainer.strategy) if zero2 else {}),
        **placements,
    )


def zero2_settings(strategy: Zero2Strategy) -> dict[str, Any]:
    """What of the engine's config decides its memory."""
    assert strategy.config is not None
    zero = strategy.config["zero_optimization"]
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return {"offload_optimizer": offloaded, "bucket_size": int(zero["reduce_bucket_size"])}
