from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.loading import check_model_path, load_causal_lm, load_config
from rlhf.models.tokenizers import load_tokenizer

SETTING = "model.some_path"


@pytest.mark.parametrize("path", ["nothing-here", "./runs/nothing", "~/nothing", "/nothing/here", "a/b/c", "n" * 300])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(UserError, match=rf"model\.some_path.*no model folder {path}"):
        check_model_path(path, SETTING)


def test_a_missing_folder_in_an_existing_one_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no model folder runs/nothing"):
        check_model_path("runs/nothing", SETTING)
    check_model_path("EleutherAI/pythia-1b-deduped", SETTING)


@pytest.mark.parametrize("load", [load_causal_lm, load_config, lambda path, name: load_tokenizer(path, None, name)])
def test_a_folder_that_is_no_model_is_named(load: Callable[[str, str], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.some_path.*has no config\.json"):
        load(str(tmp_path), SETTING)


@pytest.mark.parametrize("config", ["not json", json.dumps({"model_type": "no-such-model"}), "{}"])
def test_a_broken_configuration_is_named(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"model\.some_path"):
        load_config(str(tmp_path), SETTING)


def test_home_and_no_path(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", model_path)
    (load_causal_lm("~"), load_tokenizer("~"))
    with pytest.raises(UserError, match=r"model\.some_path: there is no model folder \(it is empty\)"):
        check_model_path("", SETTING)


def test_missing_weights_are_named(model_path: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(model_path) / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.some_path.*cannot be loaded"):
        load_causal_lm(str(tmp_path), SETTING)


def test_a_model_that_is_no_causal_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=r"model\.some_path.* is of type vit, which is no causal language model"):
        load_causal_lm(str(tmp_path), SETTING)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_the_precision_is_the_wanted_one(
    model_path: str, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    load_causal_lm(model_path, dtype=stored).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), dtype=wanted)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert not model.training


def test_the_default_precision_is_float32(model_path: str, tmp_path: Path) -> None:
    load_causal_lm(model_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path)).dtype == torch.float32


def test_an_evaluation_changes_no_weight_of_rwkv(tmp_path: Path) -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    shape = {"hidden_size": 8, "attention_hidden_size": 8, "num_hidden_layers": 3, "context_length": 16}
    original = RwkvForCausalLM(RwkvConfig(vocab_size=16, rescale_every=1, **shape))
    original.save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path))
    model(torch.tensor([[1, 2, 3]]))
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in original.state_dict().items())


@pytest.mark.cpu_only("models are loaded on the CPU, where rounding hides nothing")
def test_a_small_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=64, is_decoder=False, **shape)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.model_path: .* is no causal language model: .* depends on"):
        load_causal_lm(str(tmp_path))


def test_attention_is_not_planned_for_every_shape(model_path: str, device: str) -> None:
    """On an H100 or newer, PyTorch asks cuDNN first for attention with a mask, which plans each new shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_causal_lm(model_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    if device == "cuda":
        states = torch.ones(2, 2, 8, 64, dtype=torch.bfloat16)
        mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
        with torch.profiler.profile() as profile:
            torch.nn.functional.scaled_dot_product_attention(states, states, states, mask)
        assert not [event for event in profile.key_averages() if "cudnn" in event.key]
