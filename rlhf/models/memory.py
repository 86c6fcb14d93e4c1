"""An estimate of the peak memory of each device, from the shapes of a run, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Literal

import pydantic.dataclasses
import torch
from pydantic import ConfigDict
from torch import nn

from rlhf.hardware import GIB
from rlhf.models.adapters import LoRA, train_adapter_only
from rlhf.models.classifiers import classifier_config
from rlhf.models.frozen import Placement
from rlhf.models.probes import backbone_of
from rlhf.models.remote_code import trusts_remote_code
from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.logprobs import LOGITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOAT32, BFLOAT16 = 4, 2
ZERO3_PREFETCH = 50_000_000  # values that DeepSpeed gathers before their use (stage3_prefetch_bucket_size)
LANGUAGE_MODEL, SCALAR_MODEL = slice(0, 1), slice(1, 2)  # of what `networks` returns
TRAINED = {"sft": LANGUAGE_MODEL, "reward": SCALAR_MODEL, "dpo": LANGUAGE_MODEL, "ppo": slice(0, 2)}
QUANTISED = {None: 0.0, "int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}  # bytes per value, with constants of blocks
AT_WORK = 2 / 3  # what a layer holds at a time, of what it would keep for the backward pass (measured)


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(title="trainer"))
class Workload:
    """The shapes of a run that decide how much memory each process needs."""

    stage: Literal["sft", "reward", "dpo", "ppo"]
    strategy: Literal["single", "ddp", "zero2"] = "single"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"  # autocast over float32 weights; under zero2 bf16 weights
    world_size: int = 1
    micro_batch: int = 1  # rows (reward model and DPO: pairs) that go through the networks at a time in training
    inference_batch: int = 1  # the same without gradients, in rollouts and validation
    query_length: int = 512  # the longest, in tokens
    response_length: int = 53  # the longest, in tokens
    reference: Placement | None = "device"  # None: there is no such model
    reward: Placement | None = "device"
    offload_optimizer: bool = False  # ZeRO keeps the optimizer's states in CPU memory
    activation_checkpointing: bool = False
    bucket_size: int = 200_000_000  # values that ZeRO reduces at a time, at most those of the model
    gradient_as_bucket_view: bool = False  # DDP's setting of that name
    lora: LoRA | None = None  # adapters are trained in place of all weights
    quantization: Literal["nf4", "int8"] | None = None  # of the base of the adapters
    bases: int = 1  # of policy and critic: 2, if the reward model is no adapter on the policy's base
    critic: bool = True  # of PPO: whether there is one
    engine_cache_gib: float = 0.0  # of another program that samples; 0: there is none
    engine_sleeps: bool = True  # and gives its memory back while the model is trained, as on GPUs


@dataclass(frozen=True)
class Phase:
    """Bytes that are on the device at the same time, by part (docs/memory.md)."""

    weights: int
    optimizer_states: int
    frozen_models: int
    gradients: int = 0
    buffers: int = 0
    weight_copies: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    engine: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(astuple(self))


def estimate(config: PreTrainedConfig, workload: Workload) -> dict[str, Phase]:
    """Estimates the memory of a stage on each device; the peak is the largest phase, as they follow one another.

    The phases are `sampling`, `scoring` (other forwards without gradients), `training` and `step`, with adapters also
    `start`. `config` is that of the language model from which all networks of the stage are made.
    """
    f = _Formula(config, workload)
    pairs = 2 if workload.stage in ("reward", "dpo") else 1
    micro, rows = pairs * workload.micro_batch, pairs * workload.inference_batch
    # Beside the two moments of each value ZeRO keeps a float32 master copy of each rank's share.
    always = Phase(
        f.stored * f.parameters + f.base(), (3 if f.zero else 2) * f.moments, f.frozen("device"),
        engine=0 if workload.engine_sleeps else f.engine(),
    )  # fmt: skip
    stepped = replace(always, gradients=FLOAT32 * f.own, buffers=0 if f.zero else f.reduction())
    # Without ZeRO gradients live until the next forward of training; PPO frees them before its rollout.
    between = always if f.zero or workload.stage == "ppo" else stepped
    work, outputs = f.at_work(rows), f.logits(rows)
    forward = replace(between, weight_copies=f.copies(f.trained[:1]), activations=work)
    moved = always.frozen_models + max(f.frozen("cpu"), f.frozen("zero3"))
    # Logits are computed after the layers, so the larger of the two counts.
    either = {"activations": work} if work > outputs else {"activations": 0, "logits": outputs}
    # Copies of weights for sampling stay until values are computed, in validation until frozen models are read.
    values = replace(forward, weight_copies=f.copies(f.trained) + f.copied_output(), **either)
    read = replace(forward, frozen_models=moved, **either)
    kept = {"activations": f.activations(micro), "logits": f.output_layer(micro)}
    phases = {
        "sampling": replace(between, engine=f.engine()) if f.engine() else replace(forward, kv_cache=f.kv_cache(rows)),
        "scoring": max(values, read, key=lambda phase: phase.total) if workload.stage == "ppo" else read,
        "training": replace(stepped, buffers=f.reduction(), weight_copies=f.copies_in_training(), **kept),
        "step": replace(stepped, buffers=stepped.buffers + f.moments),  # square roots of all second moments at once
    }
    if workload.stage in ("reward", "dpo"):
        del phases["sampling"]
    if workload.lora is not None:
        phases["start"] = Phase(f.at_start(), 0, 0)
    return phases


def pinned(config: PreTrainedConfig, workload: Workload) -> int:
    """Computes the bytes of CPU memory in which each process keeps its frozen models of placement `cpu`."""
    return sum(_Formula(config, workload).sizes("cpu"))


class Network:
    """Counts the values of a model: all, per matrix, of untied matrices, trained, and of the largest one trained.

    The model has no weights, and gets an adapter if there is one.
    """

    def __init__(self, model: nn.Module, lora: LoRA | None = None) -> None:
        self.parameters = sum(p.numel() for p in model.parameters())
        tied = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        layers = [(name, m) for name, m in model.named_modules() if not isinstance(m, nn.Embedding)]
        own = [(f"{name}.{key}", p) for name, m in layers for key, p in m.named_parameters(recurse=False)]
        self.matrices = {name: p.numel() for name, p in own if p.dim() == 2}
        self.untied = sum(p.numel() for _, p in own if p.dim() == 2 and p not in tied)
        if lora is not None:
            train_adapter_only(model.model if isinstance(model, ScalarModel) else model, lora)
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        self.trained, self.largest = sum(trained), max(trained)


def networks(config: PreTrainedConfig, stage: str = "ppo", lora: LoRA | None = None) -> tuple[Network, ...]:
    """Measures the language model, a reward model or critic, and the backbone of both. Nothing is loaded.

    SFT and DPO, which some types allow alone, get the language model twice.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    trusted = trusts_remote_code()
    with torch.device("meta"):
        language_model = scalar_model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    alone = stage in ("sft", "dpo")
    if not alone:
        labelled = classifier_config(config)
        with torch.device("meta"):
            scalar_model = ScalarModel(
                AutoModelForSequenceClassification.from_config(labelled, trust_remote_code=trusted)
            )
    backbone, language = Network(backbone_of(language_model)), Network(language_model, lora)
    return language, language if alone else Network(scalar_model, lora), backbone


def trained_parameters(config: PreTrainedConfig, stage: str, lora: LoRA | None = None, critic: bool = True) -> int:
    """Counts the values that a stage trains. Nothing is loaded."""
    return sum(network.trained for network in _trained(networks(config, stage, lora), stage, critic))


def _trained(measured: Sequence[Network], stage: str, critic: bool) -> Sequence[Network]:
    return measured[:1] if stage == "ppo" and not critic else measured[TRAINED[stage]]


class _Formula:
    """The terms of the estimate in bytes, one method each."""

    def __init__(self, config: PreTrainedConfig, run: Workload) -> None:
        self.run, self.config = run, config.get_text_config()
        measured = networks(config, run.stage, run.lora)
        self.language_model, self.scalar_model, self.backbone = measured
        self.trained = _trained(measured, run.stage, run.critic)
        self.zero = run.strategy == "zero2"
        self.mixed = run.precision == "bf16-mixed"
        self.parameters = sum(network.trained for network in self.trained)
        self.own = math.ceil(self.parameters / run.world_size) if self.zero else self.parameters
        self.compute = BFLOAT16 if self.mixed else FLOAT32
        self.stored = self.compute if self.zero else FLOAT32
        self.moments = 0 if run.offload_optimizer else FLOAT32 * self.own  # AdamW has first and second ones
        self.tokens = run.query_length + run.response_length
        # States per row that the output layer reads.
        self.outputs = {"sft": self.tokens, "reward": 0}.get(run.stage, run.response_length)

    def base(self) -> int:
        # Frozen weights below adapters, once for all networks. What autocast would cast is kept in that precision.
        if self.run.lora is None:
            return 0
        model, quantised = self.language_model, self.backbone.untied if self.run.quantization else 0
        kept = self.held(model.parameters - quantised, model.untied - quantised)
        return self.run.bases * (kept + int(QUANTISED[self.run.quantization] * quantised))

    def at_start(self) -> int:
        # Of the last base that is loaded, what autocast would cast is there twice until it turns out that it can go.
        model, quantised = self.language_model, self.backbone.untied if self.run.quantization else 0
        copied = BFLOAT16 * (self.mixed and not self.zero) * (model.untied - quantised)
        return self.base() + 2 * copied

    def held(self, values: int, untied: int) -> int:
        # What autocast would cast is kept in that precision, but for what is tied to an embedding.
        return self.stored * values - (FLOAT32 - BFLOAT16) * (self.mixed and not self.zero) * untied

    def reduction(self) -> int:
        # DDP copies all gradients into buckets. ZeRO fills two in turn, and a larger weight has one of its own; with
        # float32 weights it also holds the last micro-batch's share until it is added to the sum.
        if self.zero:
            largest = max(network.largest for network in self.trained)
            bucket = max(min(self.run.bucket_size, self.parameters), largest)
            return 2 * self.stored * bucket + (0 if self.mixed else FLOAT32 * self.own)
        copied = self.run.strategy == "ddp" and not self.run.gradient_as_bucket_view
        return FLOAT32 * self.parameters if copied else 0

    def copies(self, networks: Sequence[Network]) -> int:
        # Autocast casts the matrices that it multiplies with; its cache keeps the copies in rollouts and validation.
        cast = self.mixed and not self.zero
        if self.run.lora is not None:  # the base is kept so
            return BFLOAT16 * sum(network.trained for network in networks) if cast else 0
        return BFLOAT16 * sum(sum(network.matrices.values()) for network in networks) if cast else 0

    def copied_output(self) -> int:
        # The output layer is cast once more where log-probabilities are read.
        return 0 if self.run.lora else self.copies([self.language_model]) - self.copies([self.backbone])

    def copies_in_training(self) -> int:
        # The backward pass needs them all; with activation checkpointing those of the output layer and of a layer.
        if self.run.lora is not None:
            model = self.language_model
            tied = 0 if self.run.stage == "reward" else sum(model.matrices.values()) - model.untied
            return self.copies(self.trained) + BFLOAT16 * tied * (self.mixed and not self.zero)
        if not self.run.activation_checkpointing:
            return self.copies(self.trained)
        output = 0 if self.run.stage == "reward" else self.copied_output()
        return output + self.copies([self.backbone]) // self.config.num_hidden_layers

    def layer(self, rows: int) -> int:
        # One layer keeps for its backward pass, per token, the wide side of every linear layer, a gate also after its
        # activation, the results of two norms, rotated queries and keys, and in float32 the inputs of the norms: one,
        # if attention and MLP share it. Attention keeps no T x T matrix, and has no mask.
        hidden, matrices = self.config.hidden_size, self.backbone.matrices
        gates = sum(values for name, values in matrices.items() if "gate" in name)
        wide = (sum(matrices.values()) + gates) // (hidden * self.config.num_hidden_layers)
        if self.run.lora is not None and self.run.lora.dora:  # keeps the results of base and adapter, too
            wide *= 3
        inputs = 1 if getattr(self.config, "use_parallel_residual", False) else 2
        token = self.compute * (wide + 4 * hidden) + FLOAT32 * inputs * hidden
        return rows * self.tokens * token

    def at_work(self, rows: int) -> int:
        # A layer holds this much in a forward without gradients. With an adapter its widest module has two results, and
        # under autocast its input once more, in the precision of the adapter.
        held = int(AT_WORK * self.layer(rows))
        if self.run.lora is not None:
            widest = max(self.backbone.matrices.values()) // self.config.hidden_size
            cast = FLOAT32 if self.mixed and not self.zero else 0
            held += rows * self.tokens * widest * (self.compute + cast)
        return held

    def activations(self, rows: int) -> int:
        # Those of all layers of all networks, and those that the layer at work adds in the backward pass.
        layers, kept = len(self.trained) * self.config.num_hidden_layers, self.layer(rows)
        if self.run.activation_checkpointing:
            kept = rows * self.tokens * self.stored * self.config.hidden_size
        return layers * kept + self.in_backward(rows)

    def in_backward(self, rows: int) -> int:
        # The gradients of a layer, and the activations that are computed again.
        return int(AT_WORK * self.layer(rows)) + (self.layer(rows) if self.run.activation_checkpointing else 0)

    def logits(self, rows: int) -> int:
        # In float32, of a stretch of the vocabulary: the logits, their distance from the largest, its exponential.
        return 3 * FLOAT32 * min(rows * self.outputs * self.config.vocab_size, LOGITS["cuda"])

    def output_layer(self, rows: int) -> int:
        # It adds to the peak of training its logits, later its gradient (under autocast also cast), at a time when no
        # other layer is at work.
        size = self.compute + (FLOAT32 if self.mixed and not self.zero else 0)
        trained = self.run.stage != "reward" and self.run.lora is None
        gradient = 0 if not trained else size * self.config.vocab_size * self.config.hidden_size
        return max(0, max(self.logits(rows), gradient + self.logits(rows) // 3) - self.in_backward(rows))

    def kv_cache(self, rows: int) -> int:
        # Keys and values of every token; under autocast in float32, the precision of rotated keys.
        # Recurrent layers have a state instead, whose size does not grow with the row.
        values = 0
        for layer in self.config.per_layer_config:
            if heads := getattr(layer, "num_attention_heads", None):
                size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
                values += 2 * (getattr(layer, "num_key_value_heads", None) or heads) * size
        return rows * self.tokens * values * self.stored

    def engine(self) -> int:
        # Its weights are whole, in the precision of the policy's computing.
        cache = int(GIB * self.run.engine_cache_gib)
        return cache and cache + self.compute * self.language_model.parameters

    def placed(self, placement: Placement) -> list[Network]:
        held = [(self.run.reference, self.language_model), (self.run.reward, self.scalar_model)]
        return [model for where, model in held if where == placement and self.run.stage == "ppo"]

    def sizes(self, placement: Placement) -> list[int]:
        if self.run.lora is not None:  # adapters, if it has any, on the base of the trained networks
            return [self.stored * model.trained for model in self.placed(placement)]
        return [self.held(model.parameters, model.untied) for model in self.placed(placement)]

    def frozen(self, placement: Placement) -> int:
        # `device`: models that stay. `cpu`: the larger one that is copied. `zero3`: the weight in use and the next.
        if placement == "zero3":
            held = self.placed(placement)
            return self.stored * max((min(m.parameters, m.largest + ZERO3_PREFETCH) for m in held), default=0)
        return sum(self.sizes(placement)) if placement == "device" else max(self.sizes(placement), default=0)
