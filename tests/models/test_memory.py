from __future__ import annotations

import contextlib
import copy
import io
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.models import backbone
from rlhf.models.actor_critic import ActorCritic, response_logprobs
from rlhf.models.adapters import LoRA
from rlhf.models.half_weights import keep_half
from rlhf.models.loading import checkpoint_activations
from rlhf.models.memory import Phase, Workload, estimate, networks, pinned
from rlhf.models.networks import AdaptedNetworks
from rlhf.models.output_layer import logprobs_at
from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.sequences import model_inputs
from rlhf.sampling import token_readers
from rlhf.sampling.sampler import Decoding, sample, uniforms

ROOT = Path(__file__).parents[2]
QUERY, RESPONSE, VOCABULARY = 64, 16, 1600
# How the networks hold their weights on one process: `bf16-mixed` is autocast, but bfloat16 weights under ZeRO.
FLOAT32 = {"strategy": "single", "precision": "32-true"}
AUTOCAST = {"strategy": "single", "precision": "bf16-mixed"}
BFLOAT16 = {"strategy": "zero2", "precision": "bf16-mixed"}


@pytest.fixture(autouse=True)
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is of padded rows; packed ones need less."""
    for user in (backbone, token_readers):
        monkeypatch.setattr(user, "packs", lambda _: False)


def pythia(hidden: int, layers: int, heads: int, vocabulary: int) -> Any:
    from transformers import GPTNeoXConfig

    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return GPTNeoXConfig(**shape, intermediate_size=4 * hidden, vocab_size=vocabulary)


def llama(layers: int = 6) -> Any:
    from transformers import LlamaConfig

    shape = {"hidden_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**shape, intermediate_size=344, vocab_size=VOCABULARY)


CONFIGS: dict[str, Callable[[], Any]] = {"gpt_neox": lambda: pythia(128, 6, 4, VOCABULARY), "llama": llama}


def build(config: Any, how: dict[str, str]) -> ActorCritic:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = torch.bfloat16 if how == BFLOAT16 else torch.float32
    labelled = copy.deepcopy(config)
    labelled.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(labelled, dtype=dtype)
    return ActorCritic(AutoModelForCausalLM.from_config(config, dtype=dtype), ScalarModel(classifier))


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[..., ActorCritic]:
    """Builds policy and critic that are adapters on one base."""
    from transformers import AutoModelForCausalLM

    def make(config: Any, how: dict[str, str], lora: LoRA) -> ActorCritic:
        if not (tmp_path / "base").exists():
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        dtype, half = torch.bfloat16 if how == BFLOAT16 else torch.float32, torch.bfloat16 if how == AUTOCAST else None
        made = AdaptedNetworks(dtype, torch.device("cpu"), 1, lora, half)
        base = str(tmp_path / "base")
        return ActorCritic(made.language_model(base, "", trained=True), made.scalar_model(base, "", trained=True))

    return make


@pytest.fixture
def autocast(device: str) -> Callable[..., Any]:
    """The context of a rollout and, without a cache, that of Lightning for a step of training."""
    return lambda how, cache=True: torch.autocast(device, torch.bfloat16, enabled=how == AUTOCAST, cache_enabled=cache)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, QUERY + RESPONSE))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


def forward(models: ActorCritic, stage: str, rows: int) -> Tensor:
    ids, mask = batch(2 * rows if stage == "reward" else rows)
    if stage == "ppo":
        now = models(ids[:, :QUERY], mask[:, :QUERY], ids[:, QUERY:], mask[:, QUERY:], 0.7)
        return now.logprobs.sum() + now.values.sum()
    if stage == "sft":
        mask = mask.flip(1)  # padded on the right
        places = mask[:, 1:].nonzero(as_tuple=True)
        return -logprobs_at(models.policy, ids, mask, places, ids[:, 1:][places])[0].sum()
    return models.critic.score(ids, mask).sum()


def draw(policy: Any) -> None:
    queries, mask = (tensor[:, :QUERY] for tensor in batch(4))
    numbers = uniforms(4, RESPONSE, torch.Generator()).to(queries.device)
    sample(policy, queries, mask, numbers, Decoding(0.7, (-1,), 0))


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes in tensors that were made inside and are still alive."""

    def __init__(self, models: ActorCritic) -> None:
        super().__init__()
        known = [*models.parameters(), *models.buffers(), *(p.grad for p in models.parameters() if p.grad is not None)]
        self.alive: dict[int, Any] = {t.untyped_storage()._cdata: t for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out) if self.counts(func, args) else ():
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                self.watch(tensor.untyped_storage())
        return out

    def counts(self, func: Any, args: Any) -> bool:
        return True

    def watch(self, storage: Any) -> None:
        if storage.device.type == "meta":
            return
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Copies(PeakMemory):
    """The largest number of bytes in copies of weights alone."""

    def __init__(self, models: ActorCritic) -> None:
        super().__init__(models)
        self.weights = {parameter.untyped_storage()._cdata for parameter in models.parameters()}

    def counts(self, func: Any, args: Any) -> bool:
        return func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights


def made(phase: Phase) -> int:
    """What a forward and a backward make: all but what is there before."""
    return phase.activations + phase.logits + phase.kv_cache + phase.weight_copies


def workload(stage: str, how: dict[str, str], **settings: Any) -> Workload:
    rows = {"micro_batch": 4, "inference_batch": 4, "query_length": QUERY, "response_length": RESPONSE}
    return Workload(stage, **how, **{**rows, **settings})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ((2048, 16, 8, 50304), 1_011_781_632),
        ((2560, 32, 32, 50304), 2_775_208_960),
        ((4096, 32, 32, 50432), 6_857_302_016),
    ],
)
def test_pythia_has_as_many_parameters_as_published(shape: tuple[int, int, int, int], parameters: int) -> None:
    hidden, vocabulary = shape[0], shape[3]
    language_model, scalar_model, backbone = networks(pythia(*shape))
    assert language_model.parameters == parameters
    assert backbone.parameters == parameters - hidden * vocabulary  # without the output layer
    assert scalar_model.parameters == backbone.parameters + hidden + 1  # with a head and its bias


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_gradients_and_states_are_those_of_a_real_step(kind: str, stage: str) -> None:
    models = build(CONFIGS[kind](), FLOAT32)
    trained = {"sft": models.policy, "reward": models.critic, "ppo": models}[stage]
    optimizer = torch.optim.AdamW(trained.parameters())
    forward(models, stage, 1).backward()
    optimizer.step()
    states = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    found = estimate(CONFIGS[kind](), workload(stage, FLOAT32))["training"]
    assert found.weights == sum(p.nbytes for p in trained.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in trained.parameters() if p.grad is not None)
    assert found.optimizer_states == sum(v.nbytes for v in states)


@pytest.mark.parametrize("how", [FLOAT32, AUTOCAST, BFLOAT16])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_with_adapters_the_base_is_there_once(kind: str, stage: str, how: dict[str, str], adapted: Any) -> None:
    config, lora = CONFIGS[kind](), LoRA(rank=4)
    models = adapted(config, how, lora)
    policy, critic = models.policy, models.critic
    trained: Any = {"sft": [policy], "reward": [critic], "ppo": [policy, critic]}[stage]
    weights = {p: p for model in trained for p in model.parameters()}  # each once
    adapters = [p for p in weights if p.requires_grad]
    found = estimate(config, workload(stage, how, lora=lora))
    more = policy.get_output_embeddings().weight.nbytes if stage == "reward" else 0  # which a reward model has not
    bias = 2 if how == BFLOAT16 and stage != "sft" else 0  # is float32 until DeepSpeed casts it
    expected = sum(p.nbytes for p in weights) + more - bias
    assert found["training"].weights == pytest.approx(expected, rel=0.005 if how == AUTOCAST else 0)
    assert found["training"].gradients == 4 * sum(p.numel() for p in adapters)
    assert found["training"].optimizer_states == (3 if how == BFLOAT16 else 2) * found["training"].gradients
    frozen = found["scoring"].frozen_models
    assert frozen < 0.2 * found["training"].weights if stage == "ppo" else not frozen


@pytest.mark.parametrize("how", [FLOAT32, AUTOCAST, BFLOAT16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_cache_is_that_of_a_real_forward(kind: str, how: dict[str, str], autocast: Any) -> None:
    from transformers import DynamicCache

    config = CONFIGS[kind]()
    models, cache = build(config, how), DynamicCache(config=config)
    with torch.no_grad(), autocast(how):
        models.policy(**model_inputs(*batch(3)), past_key_values=cache, use_cache=True)
    found = estimate(config, workload("ppo", how, inference_batch=3))["sampling"]
    assert found.kv_cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_an_engine_samples_in_place_of_the_model_and_sleeps_otherwise_if_it_can() -> None:
    config = CONFIGS["gpt_neox"]()
    plain = estimate(config, workload("ppo", AUTOCAST))
    found = estimate(config, workload("ppo", AUTOCAST, engine_cache_gib=0.5))
    weights = 2 * networks(config)[0].parameters
    assert found["sampling"].engine == weights + 2**29
    assert found["sampling"].kv_cache == found["sampling"].weight_copies == 0
    assert {name: phase for name, phase in found.items() if name != "sampling"} == {
        name: phase for name, phase in plain.items() if name != "sampling"
    }
    awake = estimate(config, workload("ppo", AUTOCAST, engine_cache_gib=0.5, engine_sleeps=False))
    assert all(phase.engine == weights + 2**29 for phase in awake.values())


def test_zero_shares_out_gradients_and_states() -> None:
    config = CONFIGS["gpt_neox"]()
    n = networks(config)[0].parameters
    mixed = estimate(config, workload("sft", BFLOAT16, world_size=8))
    share = -(-n // 8)
    assert (mixed["training"].weights, mixed["training"].optimizer_states) == (2 * n, 12 * share)
    assert (mixed["training"].gradients, mixed["sampling"].gradients) == (4 * share, 0)
    full = {**BFLOAT16, "precision": "32-true"}
    whole = estimate(config, workload("sft", full, world_size=8))["training"]
    assert (whole.weights, whole.optimizer_states, whole.gradients) == (4 * n, 12 * share, 4 * share)
    assert whole.buffers == mixed["training"].buffers * 2 + 4 * share  # and the last sum
    assert mixed["training"].buffers == 2 * 2 * n  # a bucket is at most the model
    buckets = estimate(config, workload("sft", BFLOAT16, world_size=8, bucket_size=10**6))
    assert buckets["training"].buffers == 2 * 2 * 10**6 < 2 * 2 * n
    embedding = estimate(pythia(256, 2, 4, 50304), workload("sft", BFLOAT16, bucket_size=10**6))["training"]
    assert embedding.buffers == 2 * 2 * 256 * 50304
    offloaded = estimate(config, workload("sft", BFLOAT16, world_size=8, offload_optimizer=True))
    assert offloaded["training"].optimizer_states == offloaded["step"].buffers == 0


def test_ddp_holds_gradients_twice_unless_they_are_views_of_its_buckets() -> None:
    config, ddp = CONFIGS["gpt_neox"](), {"strategy": "ddp", "precision": "32-true"}
    n = networks(config)[0].parameters
    for phase in estimate(config, workload("sft", ddp, world_size=2)).values():
        assert phase.gradients == 4 * n
        assert phase.buffers >= 4 * n
    views = estimate(config, workload("sft", ddp, world_size=2, gradient_as_bucket_view=True))
    assert views["training"].buffers == 0


# ---------------------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize("how", [FLOAT32, AUTOCAST, BFLOAT16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_activations_are_what_autograd_keeps(kind: str, how: dict[str, str], autocast: Any) -> None:
    models, kept = build(CONFIGS[kind](), how), {}
    weights = {p.untyped_storage()._cdata for p in models.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.update({storage._cdata: storage} if storage._cdata not in weights else {})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(how, cache=False):
        loss = forward(models, "reward", 4)
    saved = sum(storage.nbytes() for storage in kept.values())
    found = estimate(CONFIGS[kind](), workload("reward", how))["training"]
    assert 0.8 < (found.activations + found.weight_copies) / saved < 1.2
    del loss


@pytest.mark.parametrize(
    ("kind", "stage", "how"),
    [
        ("gpt_neox", "sft", FLOAT32),
        ("gpt_neox", "reward", AUTOCAST),
        ("gpt_neox", "ppo", BFLOAT16),
        ("gpt_neox", "ppo", AUTOCAST),
        ("llama", "sft", BFLOAT16),
        ("llama", "ppo", FLOAT32),
        ("llama", "reward", AUTOCAST),
    ],
)
def test_a_micro_batch_of_training_makes_what_is_estimated(
    kind: str, stage: str, how: dict[str, str], autocast: Any
) -> None:
    models = build(CONFIGS[kind](), how)
    for parameter in models.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with PeakMemory(models) as measured:
        with autocast(how, cache=False):
            loss = forward(models, stage, 4)
        loss.backward()
    found = made(estimate(CONFIGS[kind](), workload(stage, how))["training"])
    assert 0.8 < found / measured.peak < 1.15


@pytest.mark.parametrize(
    ("kind", "stage", "how"),
    [
        ("gpt_neox", "ppo", FLOAT32),
        ("gpt_neox", "ppo", AUTOCAST),
        ("gpt_neox", "reward", BFLOAT16),
        ("llama, tied", "ppo", BFLOAT16),
    ],
)
def test_adapters_make_what_is_estimated(
    kind: str, stage: str, how: dict[str, str], autocast: Any, adapted: Any
) -> None:
    config, lora = CONFIGS[kind.removesuffix(", tied")](), LoRA(rank=4)
    config.tie_word_embeddings = kind.endswith("tied")
    found = estimate(config, workload(stage, how, lora=lora))
    models = adapted(config, how, lora)
    with torch.no_grad(), PeakMemory(models) as measured, autocast(how):
        forward(models, stage, 4)
    assert 0.9 < made(found["scoring"]) / measured.peak < 1.3
    for parameter in models.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with PeakMemory(models) as measured:
        with autocast(how, cache=False):
            loss = forward(models, stage, 4)
        loss.backward()
    assert 0.9 < made(found["training"]) / measured.peak < 1.3


@pytest.mark.parametrize(("kind", "how"), [("gpt_neox", FLOAT32), ("llama", AUTOCAST), ("gpt_neox", BFLOAT16)])
def test_a_base_that_is_kept_in_half_precision_needs_more_at_the_start(
    kind: str, how: dict[str, str], adapted: Any
) -> None:
    adapted(CONFIGS[kind](), how, LoRA(rank=1))  # writes the base
    with PeakMemory(nn.Module()) as measured:  # type: ignore[arg-type]
        adapted(CONFIGS[kind](), how, LoRA(rank=1))
    found = estimate(CONFIGS[kind](), workload("ppo", how, lora=LoRA(rank=1)))
    assert 0.9 < found["start"].total / measured.peak < 1.1
    assert (found["start"].total > 1.5 * found["training"].weights) == (how == AUTOCAST)


@pytest.mark.parametrize(("kind", "how"), [("llama", FLOAT32), ("gpt_neox", AUTOCAST), ("llama", BFLOAT16)])
def test_dora_needs_more(kind: str, how: dict[str, str], autocast: Any, adapted: Any) -> None:
    dora = LoRA(rank=4, dora=True)
    models = adapted(CONFIGS[kind](), how, dora)
    with PeakMemory(models) as measured:
        with autocast(how, cache=False):
            loss = forward(models, "ppo", 4)
        loss.backward()
    found = made(estimate(CONFIGS[kind](), workload("ppo", how, lora=dora))["training"])
    assert 0.8 < found / measured.peak < 1.5


@pytest.mark.parametrize("how", [BFLOAT16, AUTOCAST])
@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_checkpointing_keeps_the_inputs_of_layers_only(stage: str, how: dict[str, str], autocast: Any) -> None:
    models = build(CONFIGS["gpt_neox"](), how)
    for parameter in models.parameters():
        parameter.grad = torch.zeros_like(parameter)
    checkpoint_activations(models.policy)
    checkpoint_activations(models.critic.model)
    with PeakMemory(models) as measured:
        with autocast(how, cache=False):
            loss = forward(models, stage, 4)
        loss.backward()
    settings = workload(stage, how, activation_checkpointing=True)
    found = made(estimate(CONFIGS["gpt_neox"](), settings)["training"])
    assert 0.95 < found / measured.peak < 1.35
    assert 2.5 * found < made(estimate(CONFIGS["gpt_neox"](), workload(stage, how))["training"])


@pytest.mark.parametrize("how", [FLOAT32, AUTOCAST, BFLOAT16])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_forward_without_gradients_makes_what_is_estimated(stage: str, how: dict[str, str], autocast: Any) -> None:
    models = build(CONFIGS["gpt_neox"](), how)
    with torch.no_grad(), PeakMemory(models) as measured, autocast(how):
        if stage == "ppo":  # in one context with sampling, which leaves copies of the policy's weights
            draw(models.policy)
            measured.peak = measured.now
            forward(models, stage, 4)
        forward(models, stage, 4)
    found = made(estimate(CONFIGS["gpt_neox"](), workload(stage, how))["scoring"])
    assert 0.85 < found / measured.peak < 1.15


@pytest.mark.parametrize("how", [FLOAT32, AUTOCAST, BFLOAT16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_sampling_makes_what_is_estimated(kind: str, how: dict[str, str], autocast: Any) -> None:
    models = build(CONFIGS[kind](), how)
    with PeakMemory(models) as measured, autocast(how):
        draw(models.policy)
    found = made(estimate(CONFIGS[kind](), workload("sft", how))["sampling"])
    assert 0.9 < found / measured.peak < 1.45


@pytest.mark.parametrize(("kind", "recompute"), [("gpt_neox", False), ("llama", True), ("llama, tied", False)])
def test_copies_of_weights_are_those_that_autocast_makes(kind: str, recompute: bool, autocast: Any) -> None:
    config = CONFIGS[kind.removesuffix(", tied")]()
    config.tie_word_embeddings = kind.endswith("tied")
    models = build(config, AUTOCAST)
    if recompute:
        checkpoint_activations(models.policy)
        checkpoint_activations(models.critic.model)
    measured = {}
    with torch.no_grad(), Copies(models) as copies, autocast(AUTOCAST):
        draw(models.policy)
        measured["sampling"] = copies.peak
        for _ in range(2):  # groups of rows
            forward(models, "ppo", 4)
        measured["scoring"] = copies.peak
    assert not copies.now
    with Copies(models) as copies:
        with autocast(AUTOCAST, cache=False):
            loss = forward(models, "ppo", 4)
        loss.backward()
    measured["training"] = copies.peak
    found = estimate(config, workload("ppo", AUTOCAST, activation_checkpointing=recompute))
    for phase, peak in measured.items():
        assert found[phase].weight_copies == pytest.approx(peak, rel=0.02), phase  # biases are not counted


@pytest.mark.parametrize("how", [FLOAT32, AUTOCAST, BFLOAT16])
@pytest.mark.parametrize("kind", [*CONFIGS, "llama, tied"])
def test_frozen_models_keep_what_autocast_leaves(kind: str, how: dict[str, str], autocast: Any) -> None:
    config = CONFIGS[kind.removesuffix(", tied")]()
    config.tie_word_embeddings = kind.endswith("tied")
    models = build(config, how).requires_grad_(False)
    if how == AUTOCAST:
        policy, critic = models.policy, models.critic
        keep_half(policy, torch.bfloat16, lambda i, m: torch.stack(response_logprobs(policy, i, m, i, m > 0, 1.0)))
        keep_half(critic, torch.bfloat16, critic.score)
    found = estimate(config, workload("ppo", how))["scoring"].frozen_models
    assert found == pytest.approx(sum(p.nbytes for p in models.parameters()), rel=0.01)


# ----------------------------------------------------------------------------------------------------- what adds up


def test_frozen_models_count_where_they_are() -> None:
    config = pythia(256, 6, 4, 50304)
    language_model, scalar_model, _ = networks(config)

    def frozen(**placements: Any) -> tuple[int, int]:
        phases = estimate(config, workload("ppo", BFLOAT16, **placements))
        elsewhere = {phases[name].frozen_models for name in ("sampling", "training", "step")}
        return phases["scoring"].frozen_models, *elsewhere  # type: ignore[return-value]

    both, larger = 2 * (language_model.parameters + scalar_model.parameters), 2 * language_model.parameters
    assert frozen() == (both, both)
    assert frozen(reference="cpu", reward="cpu") == (larger, 0)
    assert frozen(reference="cpu", reward="device") == (both, 2 * scalar_model.parameters)
    assert frozen(reference="device", reward=None) == (larger, larger)
    offloaded = workload("ppo", BFLOAT16, reference="cpu", reward="cpu")
    assert pinned(config, offloaded) == both
    assert pinned(config, replace(offloaded, reward="device")) == larger
    halves = estimate(config, workload("ppo", AUTOCAST))["step"].frozen_models
    assert both < pinned(config, workload("ppo", AUTOCAST, reference="cpu", reward="cpu")) == halves < 2 * both
    assert frozen(reference="zero3", reward=None) == (larger, 0)  # so small that it is gathered as a whole
    big = estimate(pythia(4096, 32, 32, 50432), workload("ppo", BFLOAT16, reference="zero3", reward=None))
    assert 2 * 50432 * 4096 < big["scoring"].frozen_models < 0.1 * big["scoring"].weights


def test_the_largest_phase_depends_on_the_batches() -> None:
    config = CONFIGS["gpt_neox"]()
    small = workload("ppo", BFLOAT16, micro_batch=1, inference_batch=1)
    for settings, phase in (({"micro_batch": 400}, "training"), ({"inference_batch": 4000}, "sampling")):
        found = estimate(config, replace(small, **settings))
        assert max(found, key=lambda name: found[name].total) == phase
    assert "sampling" not in estimate(config, workload("reward", BFLOAT16))


@pytest.mark.parametrize(("setting", "value"), [("strategy", "fsdp"), ("precision", "bf16-true")])
def test_what_is_not_known_is_refused(setting: str, value: str) -> None:
    with pytest.raises(ValidationError, match=rf"trainer\n{setting}\n.*input_value='{value}'"):
        Workload("ppo", **{setting: value})  # type: ignore[arg-type]


def test_the_table_of_the_docs_is_what_its_snippet_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/memory.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    assert len(printed.getvalue().splitlines()) == 11
    assert printed.getvalue() in text
