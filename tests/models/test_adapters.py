"""Adapters: what they change and leave, their folders, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import IDS, MASK, logprobs, moved, scores
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.callbacks.export import write_export
from rlhf.errors import UserError
from rlhf.models.adapters import LoRA, save_adapter
from rlhf.models.loading import load_causal_lm
from rlhf.models.networks import AdaptedNetworks
from rlhf.models.packing import packs
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import RewardModule, SFTModule

CPU = torch.device("cpu")


def networks(lora: LoRA = LoRA()) -> AdaptedNetworks:
    return AdaptedNetworks(torch.float32, CPU, 1, lora, None)


@pytest.fixture
def sft(model_path: str, tmp_path: Path) -> tuple[SFTModule, str]:
    """A trained SFT module, and the folder of its adapter."""
    module = moved(SFTModule(model_path, lora=LoRA(rank=4)))
    write_export(module, tmp_path / "sft")
    return module, str(tmp_path / "sft")


@pytest.fixture
def reward(sft: tuple[SFTModule, str], tmp_path: Path) -> tuple[RewardModule, str]:
    """The same of a reward model, whose adapter goes on from that of SFT."""
    module = moved(RewardModule(sft[1], lora=LoRA(rank=4)))
    module.centre = torch.tensor(0.3)
    write_export(module, tmp_path / "reward")
    return module, str(tmp_path / "reward")


@pytest.mark.parametrize("more", [{}, {"rslora": True}, {"dora": True}, {"target_modules": ["dense", "lm_head"]}])
def test_a_new_adapter_changes_nothing(model_path: str, more: dict[str, Any]) -> None:
    lora = LoRA(rank=4, **more)
    found = logprobs(networks(lora).language_model(model_path, "model", trained=True))
    expected = logprobs(load_causal_lm(model_path))
    torch.testing.assert_close(found, expected, atol=1e-6 if len(more) else 0, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "left_out"),
    [
        ("llama4_text", {"router"}),
        ("phimoe", {"router"}),
        ("mamba", {"out_proj", "dt_proj"}),
        ("rwkv", set()),
        ("falcon", set()),
    ],
)
def test_all_linear_takes_matrices_of_which_the_product_is_all_that_is_used(
    model_type: str, left_out: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A router returns more than that, and Mamba reads matrices past their modules."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from model_types import tiny_model

    plain = tiny_model(model_type)
    plain.save_pretrained(tmp_path)
    linear = {name.rpartition(".")[2] for name, part in plain.named_modules() if isinstance(part, nn.Linear)}
    linear -= {"lm_head", "head", *left_out}
    made = networks()
    policy, critic = made.language_model(str(tmp_path), "a", True), made.scalar_model(str(tmp_path), "a", True)
    torch.testing.assert_close(logprobs(policy), logprobs(load_causal_lm(str(tmp_path))), atol=1e-6, rtol=0)
    policy(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    critic.score(IDS, MASK).sum().backward()
    for model in (policy, critic):
        gradients = {name.split(".")[-4]: p.grad for name, p in model.named_parameters() if "lora_B" in name}
        assert gradients.keys() == linear
        assert all(gradient is not None and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["lm_head", "wte"])
def test_a_matrix_of_two_modules_gets_no_adapter(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Merged, that of GPT-2's output layer would change its embedding."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from model_types import tiny_model

    tiny_model("gpt2").save_pretrained(tmp_path)
    words = r"the matrix of (lm_head|transformer\.wte) is that of another module, too"
    with pytest.raises(UserError, match=words):
        networks(LoRA(target_modules=[name])).language_model(str(tmp_path), "a", True)
    model = networks().language_model(str(tmp_path), "a", True)
    changed_names = {n for n, p in model.named_modules() if hasattr(p, "lora_A")}
    assert changed_names
    assert not {"lm_head", "transformer.wte"} & changed_names


def test_all_weights_of_a_type_with_renamed_experts_are_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """peft takes Laguna's names for older ones."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from model_types import tiny_model

    tiny_model("laguna").save_pretrained(tmp_path / "base")
    model = networks().language_model(str(tmp_path / "base"), "a", True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    save_adapter(model, tmp_path / "adapter")
    again = networks().language_model(str(tmp_path / "adapter"), "a", False)
    assert torch.equal(logprobs(again), logprobs(model))
    torch.testing.assert_close(logprobs(load_causal_lm(str(tmp_path / "adapter"))), logprobs(model), atol=1e-5, rtol=0)


def test_the_formula(model_path: str, sft: tuple[SFTModule, str]) -> None:
    """W + alpha / rank B A, and with `rslora` alpha / sqrt(rank), of weights that are read from the file."""
    written = load_file(Path(sft[1]) / "adapter_model.safetensors")
    model = load_causal_lm(model_path)
    names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in written}
    assert len(names) == 4 * len(model.gpt_neox.layers)
    for name in names:
        a, b = (written[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        model.get_submodule(name).weight.data += 32 / 4 * b @ a
    expected = logprobs(model)
    torch.testing.assert_close(logprobs(sft[0].model), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs(load_causal_lm(sft[1])), expected, atol=1e-5, rtol=0)


def test_an_adapter_loads_in_transformers_and_peft(
    sft: tuple[SFTModule, str], reward: tuple[RewardModule, str]
) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM

    for kind in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        with torch.no_grad():
            logits = kind.from_pretrained(sft[1])(IDS).logits
            torch.testing.assert_close(logits, sft[0].model(IDS).logits, atol=1e-5, rtol=0)
    model = AutoPeftModelForSequenceClassification.from_pretrained(reward[1], num_labels=1)
    model.get_base_model().config.pad_token_id = reward[0].tokenizer.pad_token_id
    shift = json.loads((Path(reward[1]) / "adapted_config.json").read_text())["reward_shift"]
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=MASK).logits.squeeze(1) - shift
    torch.testing.assert_close(found, scores(reward[0].model) - 0.3, atol=1e-5, rtol=0)


def test_a_reward_model_merged_and_not(reward: tuple[RewardModule, str]) -> None:
    expected = scores(reward[0].model) - 0.3
    torch.testing.assert_close(scores(ScalarModel.from_pretrained(reward[1], "reward")), expected, atol=1e-5, rtol=0)
    alone = networks(LoRA(rank=4)).scalar_model(reward[1], "reward", trained=False)
    torch.testing.assert_close(scores(alone), expected, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in alone.parameters())


def test_all_networks_share_one_base(sft: tuple[SFTModule, str], reward: tuple[RewardModule, str]) -> None:
    made = networks(LoRA(rank=4))
    policy, reference = (made.language_model(sft[1], "model", trained) for trained in (True, False))
    critic, judge = (made.scalar_model(reward[1], "reward", trained) for trained in (True, False))
    where = [{p.data_ptr() for name, p in m.named_parameters() if "base_layer" in name} for m in (policy, reference)]
    where += [{p.data_ptr() for name, p in m.named_parameters() if "base_layer" in name} for m in (critic, judge)]
    assert where[0]
    assert where[0] == where[1] == where[2] == where[3]
    own = [{p.data_ptr() for n, p in m.named_parameters() if "lora_" in n} for m in (policy, reference, critic, judge)]
    assert len(set.union(*own)) == sum(map(len, own))
    assert torch.equal(logprobs(policy), logprobs(reference))
    assert torch.equal(scores(critic), scores(judge))
    assert packs(policy)
    assert packs(critic.model)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    torch.testing.assert_close(logprobs(reference), logprobs(load_causal_lm(sft[1])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("export", ["merged", "both"])
def test_merged_exports(model_path: str, tmp_path: Path, export: Any) -> None:
    module = moved(SFTModule(model_path, lora=LoRA(rank=4, export=export)))
    write_export(module, tmp_path / "export")
    whole = tmp_path / "export" / ("merged" if export == "both" else "")
    assert (whole / "model.safetensors").exists()
    assert (tmp_path / "export" / "adapter_config.json").exists() == (export == "both")
    shutil.copytree(whole, tmp_path / "alone")
    torch.testing.assert_close(
        logprobs(load_causal_lm(str(tmp_path / "alone"))), logprobs(module.model), atol=1e-5, rtol=0
    )


def changed(folder: str, **changes: Any) -> None:
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_base_that_changed_is_refused(model_path: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_path, base)
    write_export(moved(SFTModule(str(base), lora=LoRA(rank=4))), tmp_path / "sft")
    load_causal_lm(str(tmp_path / "sft"))
    weights = load_file(base / "model.safetensors")
    save_file({name: x + 0.1 for name, x in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"base .* has changed since the adapter was trained on it"):
        load_causal_lm(str(tmp_path / "sft"))
    with pytest.raises(UserError, match=r"base .* has changed since the adapter was trained on it"):
        networks(LoRA(rank=4)).language_model(str(tmp_path / "sft"), "model", trained=True)


def test_adapters_that_do_not_fit(sft: tuple[SFTModule, str], model_path: str, tmp_path: Path) -> None:
    folder = sft[1]
    with pytest.raises(UserError, match=r"lora\.target_modules: .* has no q_proj; it has dense, .*query_key_value"):
        SFTModule(model_path, lora=LoRA(target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"model\.lora\.modules_to_save: .* has no wte; it has .*embed_in"):
        SFTModule(model_path, lora=LoRA(modules_to_save=["wte"]))
    with pytest.raises(UserError, match=r"model\.lora\.rank is 8, and the adapter .* has 4"):
        SFTModule(folder, lora=LoRA(rank=8))
    with pytest.raises(UserError, match=r"model\.lora\.dropout is 0\.1: it should be 0"):
        LoRA(dropout=0.1)
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    name = min(weights)
    save_file({n: x for n, x in weights.items() if n != name}, Path(folder) / "adapter_model.safetensors")
    (Path(folder) / "rlhf.json").unlink()
    with pytest.raises(UserError, match=r"does not fit its base .* is missing in the adapter, and \(4, \d+\)"):
        load_causal_lm(folder)
    changed(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"belongs to the base .*gone, which is not there"):
        SFTModule(folder)
    changed(folder, base_model_name_or_path=folder)
    with pytest.raises(UserError, match="which is an adapter too"):
        SFTModule(folder)
    (Path(folder) / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is no JSON object that can be read"):
        SFTModule(folder)


@pytest.mark.parametrize("setting", [{"bias": "all"}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"}])
def test_an_adapter_that_changes_the_shared_base_is_refused(
    sft: tuple[SFTModule, str], reward: tuple[RewardModule, str], setting: dict[str, str]
) -> None:
    changed(sft[1], **setting)
    with pytest.raises(UserError, match=r"has (bias|init_lora_weights) \w+, which may change weights of its base"):
        SFTModule(sft[1], lora=LoRA(rank=4))
    changed(reward[1], **setting)
    with pytest.raises(UserError, match=r"has (bias|init_lora_weights) \w+, which may change weights of its base"):
        networks().scalar_model(reward[1], "reward", trained=False)


def test_weights_that_are_missing_or_no_numbers(sft: tuple[SFTModule, str]) -> None:
    (Path(sft[1]) / "rlhf.json").unlink()
    file = Path(sft[1]) / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    weights[name][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"not finite: there is NaN or infinity in gpt_neox\.layers\.0.*lora_A"):
        load_causal_lm(sft[1])
    file.unlink()
    with pytest.raises(UserError, match=r"has no weights: there is no adapter_model\.safetensors"):
        load_causal_lm(sft[1])


def test_an_adapter_of_the_output_layer_leaves_the_critic_without(model_path: str, tmp_path: Path) -> None:
    lora = LoRA(rank=4, target_modules=["dense", "lm_head"])
    write_export(moved(SFTModule(model_path, lora=lora)), tmp_path / "sft")
    made, folder = networks(lora), str(tmp_path / "sft")
    policy = made.language_model(folder, "model", trained=True)
    torch.testing.assert_close(logprobs(policy), logprobs(load_causal_lm(folder)), atol=1e-5, rtol=0)
    for start in (model_path, folder):
        critic = made.scalar_model(start, "model", trained=True)
        assert {name.split(".")[-4] for name, _ in critic.named_parameters() if "lora_A" in name} == {"dense"}


def test_dropout_in_an_adapter_of_others_is_off(sft: tuple[SFTModule, str]) -> None:
    """As that of models is (D10)."""
    changed(sft[1], lora_dropout=0.5)
    module = SFTModule(sft[1], lora=LoRA(rank=4))
    module.configure_model()
    assert not [m for name, m in module.named_modules() if "lora_dropout" in name and getattr(m, "p", 0)]
    assert torch.equal(logprobs(module.model.train()), logprobs(sft[0].model))


def test_an_adapter_folder_without_configuration_and_tokenizer_takes_those_of_its_base(
    sft: tuple[SFTModule, str], model_path: str
) -> None:
    for file in Path(sft[1]).iterdir():
        if file.name not in ("adapter_config.json", "adapter_model.safetensors"):
            file.unlink()
    module = SFTModule(sft[1], lora=LoRA(rank=4))
    module.configure_model()
    assert module.tokenizer.get_vocab() == SFTModule(model_path).tokenizer.get_vocab()
    assert torch.equal(logprobs(module.model), logprobs(sft[0].model))
