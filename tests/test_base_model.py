"""The base model that the quickstart starts from is what `configs/quickstart/base_model.yaml` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, get_scheduler

from rlhf.data.texts import TextFormat, one_leading_space
from rlhf.models.loading import load_causal_lm
from rlhf.modules import Optimization
from rlhf.synthetic.posts import demonstrations
from rlhf.synthetic.synthesize import TOKENIZER_TEXTS, Sizes, SmallModel, synthesize

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart"
BASE = QUICKSTART / "base_model"
DATA = yaml.safe_load((QUICKSTART / "base_model_data.yaml").read_text())
PRETRAIN = yaml.safe_load((QUICKSTART / "pretrain.yaml").read_text())
STEPS = DATA["sizes"]["pretraining"] // PRETRAIN["data"]["init_args"]["batch_size"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The untrained model that pretraining starts from: its tokenizer is made of the first texts only."""
    output = tmp_path_factory.mktemp("base")
    sizes = Sizes(**(DATA["sizes"] | {"pretraining": TOKENIZER_TEXTS}))
    synthesize(str(output), DATA["seed"], sizes=sizes, model=SmallModel(**DATA["model"]))
    return str(output / "model")


def test_shape_tokenizer_and_steps_are_those_of_the_config(start: str) -> None:
    shipped, untrained = (AutoConfig.from_pretrained(path).to_dict() for path in (BASE, start))
    for name in ("pad_token_id", "classifier_dropout", "dtype", "transformers_version", "_name_or_path"):
        shipped.pop(name, None), untrained.pop(name, None)
    assert shipped == untrained
    mine, theirs = (json.loads((Path(path) / "tokenizer.json").read_text())["model"] for path in (BASE, start))
    assert (mine["vocab"], mine["merges"]) == (theirs["vocab"], theirs["merges"])
    manifest = json.loads((BASE / "rlhf.json").read_text())
    assert (manifest["stage"], manifest["epochs"], manifest["steps"]) == ("SFTModule", 1, STEPS)
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 1_000_000


def test_it_was_trained_from_that_start_with_these_settings(start: str) -> None:
    """What is never read gets no gradient: only weight decay has moved it, at every step's learning rate."""
    shipped, untrained = (
        load_causal_lm(str(path)).get_input_embeddings().weight.detach().double() for path in (BASE, start)
    )
    alphabet = AutoTokenizer.from_pretrained(BASE).get_vocab()
    unread = [index for token, index in alphabet.items() if len(token) == 1 and ord(token) > 255 and token not in "ĠĊ"]
    unread += list(range(len(alphabet), len(shipped)))
    assert len(unread) > 60
    o = Optimization(**PRETRAIN["model"]["init_args"]["optimization"])
    rate = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=o.learning_rate)
    schedule = get_scheduler(o.schedule, rate, o.warmup_steps, STEPS)
    kept = 1.0
    for _ in range(STEPS):
        kept *= 1 - rate.param_groups[0]["lr"] * o.weight_decay
        rate.step()
        schedule.step()
    assert 0.9 < kept < 0.99
    np.testing.assert_allclose(shipped[unread], kept * untrained[unread], rtol=1e-3, atol=1e-6)
    assert (shipped - kept * untrained).abs().max() > 0.1


def test_it_can_copy_from_a_post() -> None:
    """Of TL;DRs that state every fact it says nearly every token; only with which words one begins is free."""
    model, tokenizer = load_causal_lm(str(BASE)), AutoTokenizer.from_pretrained(BASE)
    right = total = 0
    for record in demonstrations(64, seed=5, split="held out", writers=("complete",)):
        query = tokenizer(TextFormat().query.format(**record))["input_ids"]
        answer: Any = [*tokenizer(one_leading_space(record["summary"]))["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            said = model(torch.tensor([query + answer])).logits[0, len(query) - 1 : -1].argmax(-1)
        right += int((said == torch.tensor(answer)).sum())
        total += len(answer)
    assert right / total > 0.95
