"""Small tokenizers, models and records that the tests make themselves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data.embedded import SmallModel, create_model, train_tokenizer
from rlhf.data.synthetic import demonstrations
from rlhf.data.texts import TextFormat, one_leading_space

torch.set_num_threads(1)
logging.raiseExceptions = False  # handlers of libraries outlive the stream that a test captured


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE trained on embedded posts, with [PAD]."""
    query = TextFormat().query
    texts = [query.format(**r) + one_leading_space(r["summary"]) for r in demonstrations(200, 1, "train")]
    tokenizer = train_tokenizer(texts, 500)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a tiny GPT-NeoX with random weights and the tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    create_model(folder, tokenizer, SmallModel(hidden_size=32, layers=2, heads=2, context=512), seed=1)
    return str(folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[dict[str, Any]]], str]:
    """Writes records to a JSONL file below the test's folder and returns its path."""

    def write(name: str, records: Iterable[dict[str, Any]]) -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(file)

    return write


@pytest.fixture(scope="session", params=["gpt_neox", "gpt2"])
def sharp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a tiny model with rotary or learned positions, weights so large that context and positions matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = AutoConfig.for_model(
        request.param, vocab_size=512, initializer_range=0.2, use_cache=True, **shape, **special
    )
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
