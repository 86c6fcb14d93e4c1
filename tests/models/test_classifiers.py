"""Reward models and critics of types for which transformers has a class, none, or one with another head."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, T5Config

from rlhf.errors import UserError
from rlhf.models.classifiers import register_classifier
from rlhf.models.loading import checkpoint_activations, load_causal_lm
from rlhf.models.memory import Workload, estimate
from rlhf.models.networks import Networks
from rlhf.models.output_layer import logprobs_at
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules.ppo_models import load_actor_critic
from rlhf.ops.sequences import pad_sequences

ROWS = [[5, 6, 7, 8, 9, 10, 11], [21, 22], [31, 32, 33, 34]]
KINDS = {
    "llama": False,  # transformers has a class
    "cohere": True,  # it has none
    "ctrl": True,  # its head is another
    "llama4_text": True,  # the language model calls its backbone otherwise than its class says
    "mamba": True,  # no cache in the output, no positions
    "falcon_h1": True,  # buffers that no file holds
    "afmoe": True,  # experts
}


def tokens_of(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_sequences(rows, 1)


@pytest.fixture
def tokenizer() -> Any:
    """Three tokens: the tiny models have few."""
    words = Tokenizer(WordLevel({"a": 0, "[PAD]": 1, "</s>": 2}, "a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="</s>")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that makes tiny models of any type."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import model_types

    return model_types


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Callable[[str], str]:
    def make(model_type: str) -> str:
        path = tmp_path / model_type
        tiny.tiny_model(model_type).save_pretrained(path)
        return str(path)

    return make


def last_states(path: str) -> torch.Tensor:
    """What the output layer of the language model reads at the last token of each row, one row at a time."""
    model: Any = load_causal_lm(path)
    read: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0, -1]))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    return torch.stack(read)


@pytest.mark.parametrize("model_type", KINDS)
def test_the_head_reads_what_the_output_layer_reads(
    model_type: str, folder: Callable[[str], str], tokenizer: Any, tmp_path: Path
) -> None:
    """In training and, the same, in an export that transformers reads."""
    path = folder(model_type)
    model, states, batch = ScalarModel.from_policy(path, seed=3), last_states(path), tokens_of(ROWS)
    with torch.no_grad():
        model.bias.fill_(0.5)
        expected = states @ model.head_weight[0] + 0.5
    scores = model.score(*batch)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    scores.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "embed" in name or "score" in name)
    model.save(tmp_path / "reward", tokenizer)
    again = ScalarModel.from_pretrained(str(tmp_path / "reward"), "model.reward_path")
    torch.testing.assert_close(again.score(*batch), expected, atol=1e-5, rtol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    theirs = torch.cat([plain(input_ids=torch.tensor([row])).logits[0] for row in ROWS]) - plain.config.reward_shift
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    assert register_classifier(plain.config) == KINDS[model_type]


@pytest.mark.parametrize("model_type", ["cohere", "llama4_text", "xlstm"])
def test_log_probabilities_are_those_of_plain_forwards(model_type: str, folder: Callable[[str], str]) -> None:
    """xLSTM computes all logits whatever it is asked for; the first column that is read here is not the first one."""
    model: Any = load_causal_lm(folder(model_type))
    ids, mask = tokens_of([row[:4] for row in ROWS if len(row) > 3])
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    tokens = ids[rows, columns + 1]
    with torch.no_grad():
        found, _ = logprobs_at(model, ids, mask, (rows, columns), tokens)
        plain = torch.stack([model(input_ids=row[None]).logits[0] for row in ids]).log_softmax(-1)
    torch.testing.assert_close(found, plain[rows, columns, tokens], atol=1e-5, rtol=1e-5)


def test_an_export_loads_in_a_fresh_process_after_one_line(
    folder: Callable[[str], str], tokenizer: Any, tmp_path: Path
) -> None:
    model, reward = ScalarModel.from_policy(folder("cohere"), seed=3), tmp_path / "reward"
    model.save(reward, tokenizer)
    words = [
        "import torch",
        "from transformers import AutoModelForSequenceClassification as Auto",
        f"try: Auto.from_pretrained({str(reward)!r})",
        "except ValueError: print('unknown')",
        "from rlhf import register_reward_model",
        f"register_reward_model({str(reward)!r})",
        f"print(Auto.from_pretrained({str(reward)!r})(input_ids=torch.tensor([{ROWS[0]}])).logits.item())",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(words)], capture_output=True, text=True, check=True)
    first, score = done.stdout.split()
    assert first == "unknown"
    assert float(score) == pytest.approx(model.score(*tokens_of(ROWS[:1])).item(), abs=1e-5)


def test_missing_weights_are_refused(folder: Callable[[str], str]) -> None:
    path = folder("cohere")
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing, first model\.layers\.1\.mlp\.up_proj\.weight"):
        ScalarModel.from_policy(path, seed=3)


def test_the_critic_starts_from_a_policy_without_a_class(folder: Callable[[str], str], device: str) -> None:
    path = folder("cohere")
    networks = load_actor_critic(Networks(torch.float32, torch.device(device), 5), path, None, False, True)
    theirs, ours = load_causal_lm(path).base_model.state_dict(), networks.critic.model.base_model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_types_that_make_no_reward_model_are_named(tiny: Any) -> None:
    with pytest.raises(
        UserError, match=r"model\.model_path: a model of type blt cannot become a reward model .* only SFT"
    ):
        register_classifier(tiny.tiny_config("blt"))
    with pytest.raises(UserError, match=r"reward: a model of type t5 cannot become a reward model"):
        register_classifier(T5Config(num_layers=1), "reward")


def test_a_model_whose_tokens_see_later_ones_is_refused(folder: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match="no causal language model: in XLNetLMHeadModel a token depends on later ones"):
        load_causal_lm(folder("xlnet"))


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
@torch.no_grad()
def test_padding_is_compared_only_where_a_model_takes_it(model_type: str, folder: Callable[[str], str]) -> None:
    """RWKV reads padding on the left as text; nothing here pads it so."""
    model = ScalarModel.from_policy(folder(model_type), seed=3)
    assert model.padding_side_difference(*tokens_of(ROWS)) < 1e-5


def test_models_that_cannot_compute_activations_again_are_refused(folder: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"model\.activation_checkpointing: CTRLLMHeadModel"):
        checkpoint_activations(load_causal_lm(folder("ctrl")))


def test_memory_of_models_without_attention_or_with_unlike_layers(tiny: Any) -> None:
    def cache(model_type: str) -> int:
        workload = Workload("ppo", inference_batch=2, query_length=10, response_length=5)
        return estimate(tiny.tiny_config(model_type), workload)["sampling"].kv_cache

    assert cache("mamba") == 0
    sizes = [layer.head_dim for layer in tiny.tiny_config("gemma4_text").per_layer_config]
    assert len(set(sizes)) > 1
    assert cache("gemma4_text") == 2 * 15 * 2 * 2 * sum(sizes) * 4  # rows, tokens, both, heads, sizes, bytes
