"""Quantised bases: what their adapters compute, what is shared, what is exported, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from adapted import IDS, exported, logprobs, moved, scores
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.callbacks.export import write_export
from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.models import quantization
from rlhf.models.adapters import LoRA
from rlhf.models.loading import load_causal_lm
from rlhf.models.networks import AdaptedNetworks
from rlhf.models.packing import packs
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.synthetic.synthesize import SmallModel, create_model

Make = Callable[..., Any]
CPU = torch.device("cpu")
SMALL = LoRA(rank=4)
FAST = Optimization(learning_rate=1e-2, schedule="constant", eps=1e-3)
BITS = pytest.mark.parametrize("bits", ["nf4", "int8"])


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A tiny model whose matrices have whole blocks of 64 numbers in every row."""
    folder = tmp_path_factory.mktemp("wide")
    create_model(folder, tokenizer, SmallModel(hidden_size=64, layers=2, heads=2, context=512), seed=1)
    return str(folder)


def networks(bits: Any, half: torch.dtype | None = None) -> AdaptedNetworks:
    return AdaptedNetworks(torch.float32, CPU, 1, SMALL, half, bits)


def rounded(path: str, bits: str) -> Any:
    """A plain model whose matrices, but for the output layer, are those that the library makes of rounded ones."""
    model = load_causal_lm(path)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name not in ("lm_head", "embed_out"):
            weight = layer.weight.data
            if bits == "nf4":
                packed = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
                layer.weight.data = bnb.functional.dequantize_4bit(*packed)
            else:
                whole, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
                layer.weight.data = whole.float() * scale[:, None] / 127
    return model


@BITS
def test_a_new_adapter_leaves_the_rounded_base_as_it_is(wide_path: str, bits: str) -> None:
    model: Any = networks(bits).language_model(wide_path, "model", trained=True)
    stored = {p.dtype for name, p in model.named_parameters() if "base_layer.weight" in name}
    assert stored == {torch.uint8 if bits == "nf4" else torch.int8}
    assert {p.dtype for name, p in model.named_parameters() if "base_layer.weight" not in name} == {torch.float32}
    expected = rounded(wide_path, bits)
    torch.testing.assert_close(logprobs(model), logprobs(expected), atol=1e-5, rtol=0)
    assert (logprobs(model) - logprobs(load_causal_lm(wide_path))).abs().max() > 1e-4
    assert packs(model)
    with torch.no_grad():  # of training and evaluation, and whatever else is in the batch
        evaluated, alone = model(IDS).logits, model(IDS[:1]).logits
        assert torch.equal(model.train()(IDS).logits, evaluated)
    torch.testing.assert_close(alone, evaluated[:1], atol=1e-5, rtol=0)
    assert torch.equal(model(IDS).logits, evaluated)  # with gradients


@BITS
def test_gradients_are_those_of_the_rounded_matrices(wide_path: str, bits: str) -> None:
    found: Any = networks(bits).language_model(wide_path, "model", trained=True)
    expected = rounded(wide_path, bits)
    for model in (found, expected):
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
        model(IDS).logits.square().mean().backward()
    theirs = expected.get_input_embeddings().weight.grad
    torch.testing.assert_close(found.get_input_embeddings().weight.grad, theirs, atol=1e-6, rtol=1e-4)


@BITS
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_all_networks_of_a_base_share_its_memory(
    wide_path: str, bits: str, half: torch.dtype | None, tmp_path: Path
) -> None:
    sft = exported(SFTModule(wide_path, lora=SMALL, quantization=bits), tmp_path / "sft")  # type: ignore[arg-type]
    reward = exported(RewardModule(sft, lora=SMALL, quantization=bits), tmp_path / "reward")  # type: ignore[arg-type]

    def parts(apart: bool) -> list[Any]:
        one = networks(bits, half)
        each = [networks(bits, half) if apart else one for _ in range(4)]
        return [
            each[0].scalar_model(reward, "reward", True), each[1].language_model(sft, "model", True),
            each[2].language_model(sft, "reference", False), each[3].scalar_model(reward, "reward", False),
        ]  # fmt: skip

    together, apart = parts(apart=False), parts(apart=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
        for ours, theirs in zip(together, apart, strict=True):
            compute = scores if isinstance(ours, ScalarModel) else logprobs
            assert torch.equal(compute(ours), compute(theirs))
        assert torch.equal(logprobs(together[1]), logprobs(together[2]))
        assert torch.equal(scores(together[0]), scores(together[3]))

    def held(model: nn.Module) -> dict[int, int]:
        own = (
            "lora_",
            "score",
            "model.bias",
            "quant_state",
            "nested_quant_map",
            "weight_format",
        )  # the last are made anew
        stored = model.state_dict(keep_vars=True).items()
        kept = [x.untyped_storage() for name, x in stored if name != "bias" and not any(part in name for part in own)]
        return {storage.data_ptr(): storage.nbytes() for storage in kept}

    critic, policy, reference, judge = map(held, together)
    assert policy == reference
    assert critic == judge
    assert critic.items() < policy.items()  # which has an output layer
    assert sum(policy.values()) > 100_000
    for parameter in together[1].parameters():
        assert parameter.dtype in (torch.float32, torch.bfloat16) or not parameter.requires_grad
    kinds = {p.dtype for name, p in together[1].named_parameters() if "base_layer.weight" in name}
    assert kinds == {torch.uint8 if bits == "nf4" else torch.int8}


@BITS
def test_an_export_is_merged_into_the_base_in_full_precision(wide_path: str, bits: Any, tmp_path: Path) -> None:
    lora = LoRA(rank=4, export="both")
    sft = exported(SFTModule(wide_path, lora=lora, quantization=bits), tmp_path / "sft")
    assert "quantization_config" not in json.loads((tmp_path / "sft" / "adapted_config.json").read_text())
    merged = load_file(tmp_path / "sft" / "merged" / "model.safetensors")
    adapter, base = load_file(f"{sft}/adapter_model.safetensors"), load_file(f"{wide_path}/model.safetensors")
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in adapter:
            weight = weight + 32 / 4 * adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"]
            adapter.pop(f"{key}A.weight")
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)
    assert not [name for name in adapter if "lora_A" in name]
    again = networks(bits).language_model(sft, "model", trained=True)
    module = moved(SFTModule(wide_path, lora=lora, quantization=bits))
    torch.testing.assert_close(logprobs(again), logprobs(module.model), atol=1e-6, rtol=0)


class Stop(Exception):  # noqa: N818
    pass


class Watch(Callback):
    """Keeps the rollout of every update and how far its ratio was from 1, and stops before an update if it should."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.kl, self.deviation = stop, [], []  # type: ignore[var-annotated]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.stop:
            raise Stop

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.kl.append(trainer.datamodule.last_rollout.kl)
        self.deviation.append(float(pl_module.ratio_deviation))


@pytest.mark.parametrize(("bits", "precision"), [("nf4", "32-true"), ("int8", "bf16-mixed")])
def test_ppo_is_exact_and_a_stopped_run_goes_on_to_the_same_bits(
    trainer: Make, rollout_data: Make, wide_path: str, bits: Any, precision: str, tmp_path: Path
) -> None:
    sft = exported(SFTModule(wide_path, lora=SMALL, quantization=bits), tmp_path / "sft")
    reward = exported(RewardModule(sft, lora=SMALL, quantization=bits), tmp_path / "reward")

    def fit(callbacks: list[Any], **more: Any) -> tuple[Any, Watch]:
        module = PPOModule(
            sft, reward, ppo=PPOSettings(response_length=8, ppo_epochs=2), optimization=FAST, lora=SMALL,
            quantization=bits, activation_checkpointing=precision == "bf16-mixed",
        )  # fmt: skip
        t: Any = trainer(
            max_epochs=2, precision=precision, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=True
        )
        t.fit(module, rollout_data(), **more)
        return module, callbacks[0]

    module, watch = fit([Watch(), ModelCheckpoint(tmp_path / "unused")])
    assert watch.kl[0].abs().max() == 0
    assert watch.kl[1].abs().max() > 1e-4
    if precision == "32-true":
        assert watch.deviation == [0, 0]
    kept = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    fresh = PPOModule(sft, reward, lora=SMALL, quantization=bits)
    fresh.configure_model()
    unchanged = {name: p for name, p in fresh.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert len(unchanged) == 8  # once: policy and critic share them
    assert all(torch.equal(kept[name], p) for name, p in unchanged.items())
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_on_train_epoch_end=True)
    with pytest.raises(Stop):
        fit([Watch(stop=1), checkpoint])
    state = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    whole = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert state.keys() == whole.keys()
    resumed, _ = fit([Watch(), ModelCheckpoint(tmp_path / "more")], ckpt_path=checkpoint.best_model_path)
    for name, parameter in resumed.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, whole[name]), name


def test_a_stage_on_the_command_line(wide_path: str, demonstration_file: str, tmp_path: Path, capsys: Any) -> None:
    config = Path(__file__).parent.parent.parent / "configs" / "quickstart" / "sft.yaml"
    command = [
        "fit", f"--config={config}", f"--run_dir={tmp_path / 'run'}", f"--model.model_path={wide_path}",
        f"--data.train.path={demonstration_file}", f"--data.validation.path={demonstration_file}",
        "--data.validation.split=train", "--data.batch_size=8", "--data.micro_batch_size=8",
        "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
    ]  # fmt: skip
    main([*command, "--model.lora.rank=2", "--model.quantization=nf4"])
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()
    with pytest.raises(SystemExit):
        main([*command, "--model.quantization=nf4", f"--run_dir={tmp_path / 'other'}"])
    assert "model.quantization is nf4, but rounded weights cannot be trained" in capsys.readouterr().err


def stored_quantised(path: str, bits: str, folder: Path) -> str:
    """A folder as `save_pretrained` of transformers writes a quantised model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = quantization.loading_options(bits, CPU)  # type: ignore[arg-type]
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return str(folder)


@BITS
def test_a_base_that_is_stored_quantised(
    trainer: Make, sft_data: Make, wide_path: str, bits: Any, tmp_path: Path
) -> None:
    stored = stored_quantised(wide_path, bits, tmp_path / "stored")
    module = SFTModule(stored, lora=LoRA(rank=4, export="both"), optimization=FAST)
    trainer(max_epochs=1, limit_val_batches=0).fit(module, sft_data())
    write_export(module, tmp_path / "sft")
    merged = load_causal_lm(str(tmp_path / "sft" / "merged"))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logprobs(merged), logprobs(module.model), atol=2e-5, rtol=0)
    assert (logprobs(merged) - logprobs(load_causal_lm(stored))).abs().max() > 1e-3
    again = SFTModule(str(tmp_path / "sft"), lora=SMALL)
    again.configure_model()
    torch.testing.assert_close(logprobs(again.model), logprobs(module.model), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"model\.model_path: .*stored is stored quantised \(bitsandbytes\), so that"):
        SFTModule(stored)
    with pytest.raises(UserError, match=r"model\.quantization is nf4, but model\.model_path: .* already: leave it"):
        SFTModule(stored, lora=SMALL, quantization="nf4")


def test_what_cannot_be_quantised_is_refused(wide_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model\.quantization is int8, but rounded weights .* set model\.lora, too"):
        SFTModule(wide_path, quantization="int8")
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"nf4 needs bitsandbytes: pip install bitsandbytes"):
            RewardModule(wide_path, lora=SMALL, quantization="nf4")
    module = SFTModule(wide_path, lora=SMALL, quantization="nf4")
    with monkeypatch.context() as patch:
        patch.setattr(bnb, "matmul_4bit", lambda x, packed, state: torch.zeros(len(x), state.shape[0]))
        with pytest.raises(
            UserError, match=r"on cpu, bitsandbytes computes wrong products with matrices of 64 columns"
        ):
            module.configure_model()
        patch.setattr(bnb, "matmul_4bit", None)
        with pytest.raises(UserError, match=r"nf4: bitsandbytes does not work on cpu: .*; leave the setting out"):
            module.configure_model()
    whole = LoRA(rank=4, modules_to_save=["dense_h_to_4h"])
    with pytest.raises(UserError, match=r"modules_to_save: dense_h_to_4h of .* is quantised and cannot be trained"):
        SFTModule(wide_path, lora=whole, quantization="nf4").configure_model()
    tensors = load_file(f"{wide_path}/model.safetensors")
    name = next(name for name in tensors if "dense_h_to_4h.weight" in name)
    tensors[name][3, 5] = float("nan")
    create_model(tmp_path, module.tokenizer, SmallModel(hidden_size=64, layers=2, heads=2, context=512), seed=1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for bits in ("nf4", "int8"):
        with pytest.raises(UserError, match=r"computes NaN or infinity: look at the numbers in its weights and its"):
            networks(bits).language_model(str(tmp_path), "model", trained=True)
