from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from rlhf.errors import UserError
from rlhf.models.loading import check_model_path, load_causal_lm, load_config
from rlhf.models.tokenizers import check_pad_in_embedding, load_tokenizer, save_pretrained

SETTING = "model.some_path"


@pytest.fixture
def save_tokenizer(model_path: str, tmp_path: Path) -> Callable[..., str]:
    """Saves the tokenizer with other special tokens and returns the folder."""

    def save(**special: str | None) -> str:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        for name, token in special.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text((Path(model_path) / "config.json").read_text())
        return str(tmp_path)

    return save


def test_the_tokenizers_own_pad_is_kept(model_path: str) -> None:
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.pad_token == "[PAD]"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(("wanted", "pad"), [(None, "[PAD]"), ("<fill>", "<fill>")])
def test_a_missing_pad_is_added(save_tokenizer: Callable[..., str], wanted: str | None, pad: str) -> None:
    tokenizer = load_tokenizer(save_tokenizer(pad_token=None), wanted)
    assert tokenizer.pad_token == pad
    assert tokenizer.encode(pad) == [tokenizer.pad_token_id]


def test_pad_that_is_eos_is_refused(save_tokenizer: Callable[..., str], model_path: str) -> None:
    eos = "<|endoftext|>"
    with pytest.raises(UserError, match=r"model\.some_path.*pads with its EOS.*model\.pad_token"):
        load_tokenizer(save_tokenizer(pad_token=eos), None, SETTING)
    with pytest.raises(UserError, match="pads with its EOS"):
        load_tokenizer(model_path, eos)


def test_a_tokenizer_without_eos_is_refused(save_tokenizer: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"model\.some_path.*no EOS token"):
        load_tokenizer(save_tokenizer(eos_token=None), None, SETTING)


def test_pad_must_have_a_row_in_the_embedding(model_path: str) -> None:
    tokenizer = load_tokenizer(model_path)
    check_pad_in_embedding(tokenizer, GPTNeoXConfig(vocab_size=tokenizer.pad_token_id + 1), "here")
    check_pad_in_embedding(tokenizer, load_config(model_path, SETTING), "here")
    with pytest.raises(UserError, match=rf"PAD '\[PAD\]' has id {tokenizer.pad_token_id}, outside .* model.pad_token"):
        check_pad_in_embedding(tokenizer, GPTNeoXConfig(vocab_size=tokenizer.pad_token_id), "here")


@pytest.mark.parametrize("path", ["nothing-here", "./runs/nothing", "~/nothing", "/nothing/here", "a/b/c"])
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


def test_missing_weights_are_named(model_path: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(model_path) / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.some_path.*cannot be loaded"):
        load_causal_lm(str(tmp_path), SETTING)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "llama"])
def test_a_missing_tokenizer_is_named(model_type: str, tmp_path: Path) -> None:
    """For some architectures transformers makes up a tokenizer that knows no text."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"model\.some_path.*no tokenizer"):
        load_tokenizer(str(tmp_path), None, SETTING)


def test_a_model_that_is_no_causal_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=r"model\.some_path.*cannot be loaded"):
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


@torch.no_grad()
def test_export_loads_in_plain_transformers(sharp_path: str, tokenizer: Any, tmp_path: Path) -> None:
    policy = load_causal_lm(sharp_path)
    policy.config.pad_token_id = policy.generation_config.pad_token_id = None
    save_pretrained(policy, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    ours, theirs = policy.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(plain(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    for config in (plain.config, plain.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert list(tmp_path.glob("*.safetensors"))
