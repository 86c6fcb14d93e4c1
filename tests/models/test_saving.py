"""Exports: what they hold, and that a fault shows before the training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rlhf import Export, PPOModule, RewardModule, SFTModule
from rlhf.data.texts import TextFormat
from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm
from rlhf.models.saving import rehearse_export, save_pretrained
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import eos_ids, load_tokenizer


@torch.no_grad()
def test_export_loads_in_plain_transformers(sharp_path: str, tokenizer: Any, tmp_path: Path) -> None:
    policy = load_causal_lm(sharp_path)
    policy.config.pad_token_id = policy.generation_config.pad_token_id = None
    policy.generation_config.eos_token_id = tokenizer.eos_token_id + 5  # of another tokenizer
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


CONTRADICTORY = {"do_sample": False, "temperature": 0.9, "bos_token_id": 1, "eos_token_id": [2, 13]}


@pytest.fixture
def contradictory_path(llama_path: str, tmp_path: Path) -> str:
    """A model whose generation settings transformers reads, but does not write again once they are changed."""
    folder = shutil.copytree(llama_path, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    return str(folder)


def test_an_export_keeps_all_eos_ids(contradictory_path: str, tmp_path: Path) -> None:
    tokenizer, out = load_tokenizer(contradictory_path), tmp_path / "out"
    save_pretrained(load_causal_lm(contradictory_path), tokenizer, out)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [2, 13]
    assert eos_ids(load_tokenizer(str(out))) == (2, 13)
    ScalarModel.from_policy(contradictory_path, 1).save(tmp_path / "reward", tokenizer)
    assert eos_ids(load_tokenizer(str(tmp_path / "reward"))) == (2, 13)


def test_generation_settings_that_contradict_each_other_are_dropped_and_named(
    contradictory_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(contradictory_path)
    with caplog.at_level("INFO"):
        rehearse_export(contradictory_path, tokenizer)
    assert "contradicts itself" in caplog.text
    assert "temperature" in caplog.text
    save_pretrained(load_causal_lm(contradictory_path), tokenizer, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept.keys() & CONTRADICTORY.keys() == {"bos_token_id", "eos_token_id"}


def test_generation_settings_that_agree_are_kept(llama_path: str, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_path, tmp_path / "base")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    save_pretrained(load_causal_lm(str(folder)), load_tokenizer(str(folder)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()).items() >= settings.items()


def test_a_fault_of_an_export_is_found_before_the_training(
    llama_path: str, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("This tokenizer cannot be saved.")

    monkeypatch.setattr(type(load_tokenizer(llama_path)), "save_pretrained", fail)
    for make in (SFTModule, RewardModule, lambda path: PPOModule(path, reward_function=len)):
        with pytest.raises(UserError, match=r"model\.model_path: an export of .* This tokenizer cannot be saved"):
            make(llama_path)


@pytest.mark.cpu_only("a loader makes its tensors on the CPU")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [-1, 0, 3])
def test_an_embedding_of_another_size_than_the_vocabulary(
    llama_tokenizer: Any, from_config: Callable[..., Any], trainer: Any, sft_data: Any, tmp_path: Path, tied: bool,
    spare: int,
) -> None:  # fmt: skip
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    rows = len(llama_tokenizer) + spare + 1
    base = from_config(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **shape))
    base.save_pretrained(tmp_path / "base")
    llama_tokenizer.save_pretrained(tmp_path / "base")
    module = SFTModule(str(tmp_path / "base"), response_length=3, resize_embeddings=True)
    long = TextFormat(max_query_length=2000, max_response_length=500)
    trainer(callbacks=[Export()], max_steps=1, limit_val_batches=1).fit(module, datamodule=sft_data(text=long))
    export, size = str(tmp_path / "run" / "export"), max(rows, len(llama_tokenizer) + 1)
    loaded = load_causal_lm(export)
    assert loaded.config.vocab_size == loaded.get_input_embeddings().num_embeddings == size
    assert loaded.lm_head.out_features == size
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    RewardModule(export)  # its PAD has a row
