"""Rollouts by vLLM: its tokens and log-probabilities are the policy's, after every update, or the run stops."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spies import Stop, StopAt, fit_with_spy
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.models.actor_critic import response_logprobs
from rlhf.models.adapters import LoRA, add_adapter
from rlhf.models.merging import merged_weights
from rlhf.modules import Optimization, PPOModule, PPOSettings
from rlhf.ops.losses import importance_weights
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling import vllm_engine, vllm_sampler
from rlhf.sampling.engines import make_sampler
from rlhf.sampling.sampler import Decoding, sample, uniforms
from rlhf.sampling.vllm_sampler import VLLMSampler

Make = Callable[..., Any]
EOS, PAD, GIB = 0, 1, 0.05
FAST = Optimization(learning_rate=1e-3, schedule="linear")
SETTINGS = PPOSettings(response_length=8, ppo_epochs=2, vllm_cache_gib=GIB)


@pytest.fixture(scope="module")
def engine() -> VLLMSampler:
    """Samples in all tests of models of one shape, as an engine takes seconds to start."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    return VLLMSampler(GIB, ("sampler", "cache_gib"), "go on without")


def queries(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    lengths = [3 + 5 * (row % 7) for row in range(rows)]
    return pad_sequences([torch.randint(2, vocabulary, (n,)).tolist() for n in lengths], PAD, "left")


def mean_difference(model: Any, inputs: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], heat: float) -> float:
    ids, logprobs = found
    after_end = (ids == EOS).cumsum(1) - (ids == EOS).long() > 0
    own, _ = response_logprobs(model, *inputs, ids, ~after_end, heat)
    return float(torch.where(after_end, 0.0, own - logprobs).abs().mean())


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
@torch.no_grad()
def test_an_engine_samples_what_the_model_does(
    kind: str, wide_path: str, from_config: Make, engine: VLLMSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    llama = LlamaConfig(vocab_size=500, max_position_embeddings=256, **shape)
    neox = AutoModelForCausalLM.from_pretrained(wide_path).config
    model = from_config(llama if kind == "llama" else neox)
    engine = engine if kind == "gpt_neox" else VLLMSampler(GIB, ("sampler", "cache_gib"), "go on without")
    decoding = Decoding(0.7, [EOS], PAD)
    inputs, numbers = queries(8, 400), uniforms(8, 12, torch.Generator().manual_seed(1))
    found = engine(model, *inputs, numbers, decoding)
    assert mean_difference(model, inputs, found, 0.7) < 1e-5
    assert torch.equal(engine(model, *inputs, numbers, decoding)[0], found[0])  # the seeds are those of the rows

    # Frequencies of the first token: within 5 standard errors of the probabilities.
    query, count = inputs[0][3:4, -18:], 1000
    many = (query.expand(count, -1), torch.ones(count, 18, dtype=torch.long))
    drawn, _ = engine(model, *many, torch.rand(count, 1), decoding)
    shares = torch.bincount(drawn[:, 0], minlength=model.config.vocab_size) / count
    expected = (model(query).logits[0, -1] / 0.7).softmax(0)
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1 / count).all()

    # Other weights, handed over anew, so sharp that 0.01 is greedy, after a signal to all processes to stop soon.
    assert engine.engine is not None
    assert engine.engine.process.pid is not None
    os.kill(engine.engine.process.pid, signal.SIGTERM)
    model.get_output_embeddings().weight.mul_(30)
    cold = Decoding(0.01, [EOS], PAD)
    assert torch.equal(engine(model, *inputs, numbers, cold)[0], sample(model, *inputs, numbers, cold))
    if kind == "llama":
        engine.engine.process.kill()
        with pytest.raises(UserError, match=r"sampler vllm: .* has died by SIGKILL.*cache_gib"):
            engine(model, *inputs, numbers, cold)
        # A weight that is not handed over is no weight of before.
        weights = [named for named in merged_weights(model) if named[0] != "model.layers.1.mlp.down_proj.weight"]
        monkeypatch.setattr(vllm_engine, "merged_weights", lambda _: weights)
        with pytest.raises(UserError, match=r"was not given the weights model.layers.1.mlp.down_proj.weight\."):
            engine(model, *inputs, numbers, cold)


@pytest.mark.vllm
@pytest.mark.parametrize(("heads", "gib", "why"), [(4, GIB, "head"), (2, 1e-5, "memory|cache")])
def test_an_engine_that_cannot_start_says_why(heads: int, gib: float, why: str, from_config: Make) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads, "intermediate_size": 128}
    model = from_config(LlamaConfig(vocab_size=500, max_position_embeddings=256, **shape))
    engine = make_sampler("vllm", None, gib)
    with pytest.raises(UserError) as caught:
        engine(model, *queries(2, 400), torch.rand(2, 4), Decoding(0.7, [EOS], PAD))
    assert re.fullmatch(rf"model.sampler vllm: .*({why}).* change model.ppo.vllm_cache_gib .*", str(caught.value))


@pytest.fixture
def run(wide_path: str, trainer: Make, rollout_data: Make, engine: VLLMSampler) -> Make:
    """Trains a PPOModule whose rollouts are vLLM's."""

    def words(_: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
        return [float(len(response.split())) for response in responses]

    def run(callbacks: Any = (), max_epochs: int = 2, **settings: Any) -> tuple[PPOModule, Any]:
        fit = {name: settings.pop(name) for name in ("ckpt_path",) if name in settings}
        settings = {"ppo": SETTINGS, "optimization": FAST, "reward_function": words, "sampler": "vllm"} | settings
        module = PPOModule(wide_path, **settings)
        module.draw = engine
        return module, fit_with_spy(trainer, module, rollout_data(), max_epochs, callbacks, fit)

    return run


@pytest.mark.vllm
def test_a_resumed_run_of_vllm_equals_one_that_never_stopped(run: Make, tmp_path: Path) -> None:
    expected, spy = run(max_epochs=3)
    for metrics in spy.metrics:  # after each update, too
        assert metrics["rollout/engine_difference"] < 1e-5
        assert abs(metrics["rollout/engine_kl"]) < 1e-6
        assert metrics["val/ratio_max_deviation"] < 1e-5
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_on_train_epoch_end=True)
    with pytest.raises(Stop):
        run(max_epochs=3, callbacks=[checkpoint, StopAt(2)])
    resumed, after = run(max_epochs=3, ckpt_path=checkpoint.best_model_path)
    assert torch.equal(after.rollouts[-1].responses, spy.rollouts[-1].responses)
    for a, b in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.vllm
def test_weights_of_an_earlier_update_stop_the_run(run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[tuple[str, Tensor]] = []

    def stale(model: Any) -> list[tuple[str, Tensor]]:
        first[:] = first or [(name, weight.clone()) for name, weight in merged_weights(model)]
        return first

    monkeypatch.setattr(vllm_engine, "merged_weights", stale)
    with pytest.raises(UserError, match=r"Invariant engine .* Look at model.sampler"):
        run()


@pytest.mark.vllm
def test_vllm_samples_from_merged_adapters_and_predicts(run: Make, trainer: Make, rollout_data: Make) -> None:
    ppo = PPOSettings(response_length=8, vllm_cache_gib=GIB, importance_cap=2.0)
    module, spy = run(lora=LoRA(rank=4), ppo=ppo)
    assert spy.metrics[-1]["rollout/engine_difference"] < 1e-5
    samples = [sample for batch in trainer().predict(module, rollout_data()) for sample in batch]
    assert [sample["score"] for sample in samples] == [len(sample["response"].split()) for sample in samples]


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_merged_weights_are_those_of_a_merged_model(model_path: str, dora: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path)
    names = [name for name, _ in model.named_parameters()]
    add_adapter(model, LoRA(rank=4, dora=dora, modules_to_save=["embed_in"]), model_path, 1, "model.model_path")
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.arange(2, 12)[None]
    expected = model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    weights = dict(merged_weights(model))
    assert sorted(weights) == sorted(names)
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_embedding_that_an_adapter_trains_is_handed_over_beside_the_output_layer(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, tie_word_embeddings=True, **shape))
    assert vllm_engine._config(model).tie_word_embeddings
    assert "lm_head.weight" not in dict(merged_weights(model))
    add_adapter(model, LoRA(rank=4, modules_to_save=["embed_tokens"]), str(tmp_path), 1, "model.model_path")
    embedding = model.get_input_embeddings()
    before = embedding.weight.clone()
    embedding.weight.add_(1.0)
    weights = dict(merged_weights(model))
    assert torch.equal(weights["model.embed_tokens.weight"], embedding.weight)
    assert torch.equal(weights["lm_head.weight"], before)
    assert not vllm_engine._config(model).tie_word_embeddings


def test_importance_weights_are_ratios_up_to_the_cap() -> None:
    policy, engine = torch.tensor([[0.5, 0.25, 0.8]]).log(), torch.tensor([[0.4, 0.5, 0.1]]).log()
    torch.testing.assert_close(importance_weights(policy, engine, 2.0), torch.tensor([[1.25, 0.5, 2.0]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "vllm", "ppo": PPOSettings(temperature=0.001)}, r"model.ppo.temperature is 0.001: vLLM samples"),
        ({"ppo": PPOSettings(importance_cap=2.0)}, r"importance_cap needs model.sampler vllm"),
        ({"ppo": PPOSettings(vllm_cache_gib=1.0)}, r"vllm_cache_gib is for model.sampler vllm"),
        ({"sampler": "vllm", "ppo": PPOSettings(cuda_graphs=True)}, r"cuda_graphs is for the built-in sampler"),
        ({"sampler": "vllm"}, r"model.sampler vllm needs vLLM, which is not installed"),
    ],
)
def test_settings_that_do_not_go_together(
    settings: dict[str, Any], message: str, model_path: str, reward_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        PPOModule(model_path, reward_path, **settings)


def test_memory_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vllm_engine.check_vllm("model.sampler")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(UserError, match=r"model.sampler vllm cannot .*; unset PYTORCH_CUDA_ALLOC_CONF\."):
        vllm_engine.check_vllm("model.sampler")


def test_longer_and_longer_rows_start_few_engines(wide_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []

    def start(model: Any, shape: Any, *_: Any) -> Any:
        rooms.append(shape.room)
        return SimpleNamespace(close=Mock(still_active=lambda: True))

    monkeypatch.setattr(vllm_engine, "find_spec", lambda _: True)
    monkeypatch.setattr(vllm_sampler, "start_engine", start)
    model: Any = AutoModelForCausalLM.from_pretrained(wide_path)
    model.config.max_position_embeddings = 10_000
    engine = VLLMSampler(GIB, ("sampler", "cache_gib"), "go on without")
    for room in (100, 4096, 5000, 5300, 8192, 9000, 10_000):
        engine._started(model, room, torch.float32)
    assert rooms == [4096, 8192, 10_000]


def test_a_model_whose_weights_were_quantized_is_none_for_an_engine(wide_path: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(wide_path)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "quantization_config" not in vllm_engine._config(model).to_dict()
    assert model.config.quantization_config["load_in_4bit"]
