"""Writes models with random weights, a tokenizer and data, the same files for both sides.

How long responses get is decided by the weights, so that every trainer sees it without a change to its code: the last
unit of the final layer norm is the constant 1, which makes the last column of the output layer a bias of the logits.
That of PAD is so low that it is never sampled; that of EOS either as low (`full`), or such that each token is EOS with
probability `END` (`early`).

    python -m throughput.fixtures FOLDER '{"shape": ..., "regime": "full", "lengths": [...]}'
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Regime = Literal["full", "early"]

TEMPERATURE = 0.7
NEVER = -40.0
END = 0.046  # responses of at most 53 tokens then have (1 - (1 - END)^53) / END = 19.95 on average
PAD_BELOW = 27  # PAD has id 50277 of 50304, the next after Pythia's vocabulary


@dataclass(frozen=True)
class Shape:
    """Describes a GPT-NeoX with parallel residuals, four times as wide between its layers."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 50304

    @property
    def pad_id(self) -> int:
        """Returns the id of PAD, the last word of the tokenizer."""
        return self.vocabulary - PAD_BELOW

    @property
    def layer_weights(self) -> int:
        """Counts weights that multiply every token, no biases and norms: 4 d^2 of attention and 8 d^2 of the MLP."""
        return 12 * self.layers * self.hidden**2

    @property
    def output_weights(self) -> int:
        """Counts weights of the output layer (and as many of the embedding, which multiply nothing)."""
        return self.hidden * self.vocabulary


SHAPES = {
    "test": Shape(32, 2, 2, 512),
    "tiny": Shape(256, 4, 8),
    "70m": Shape(512, 6, 8),
    "160m": Shape(768, 12, 12),
    "410m": Shape(1024, 24, 16),
    "1b": Shape(2048, 16, 8),
    "6.9b": Shape(4096, 32, 32, 50432),
}


def prompt_lengths(count: int) -> list[int]:
    """Returns lengths as of TL;DR's queries, 48 to 512 tokens, mean 289: even quantiles of a gamma distribution.

    No draws: every batch has the whole distribution, and both sides have the same batch.
    """
    from scipy.stats import gamma

    lengths = gamma(6.2, scale=50)
    low, high = lengths.cdf(48), lengths.cdf(512)
    return [round(float(lengths.ppf(low + (high - low) * (n + 0.5) / count))) for n in range(count)]


def response_lengths(count: int) -> list[int]:
    """Returns lengths as of TL;DR's summaries in tokens without EOS, evenly spaced from 12 to 52."""
    return [12 + 40 * n // max(count - 1, 1) for n in range(count)]


def write(folder: Path, shape: Shape, regime: Regime, lengths: list[int], lora: dict[str, Any] | None = None) -> None:
    """Writes `policy`, `reward` (both with the tokenizer) and one record for each length of a prompt.

    `prompts.jsonl` has the prompts, `demonstrations.jsonl` and `comparisons.jsonl` the same with responses.

    Args:
        lengths: tokens of the prompts; their words are random.
        lora: settings of an adapter on the policy, which then is the reward model.
    """
    import torch
    from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer(shape)

    def save(model: Any, name: str) -> None:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU draws 1B numbers in half a minute
        torch.manual_seed(0)
        policy = GPTNeoXForCausalLM(config_of(shape))
        with torch.no_grad():
            _set_length(policy, shape, regime)
        save(policy, "policy")
        del policy
        torch.manual_seed(1)
        if lora is None:
            save(GPTNeoXForSequenceClassification(config_of(shape)), "reward")
    if lora is not None:
        _write_adapter(folder, lora, tokenizer)
    random = torch.Generator().manual_seed(2)

    def text(length: int) -> str:
        words = torch.randint(1, shape.pad_id, (length,), generator=random).tolist()
        return " ".join(f"w{word}" for word in words)

    def responses() -> list[str]:
        order = torch.randperm(len(lengths), generator=random).tolist()  # long prompts have short ones too
        responses = response_lengths(len(lengths))
        return [f" {text(responses[n])}" for n in order]

    columns = {"prompt": [text(length) for length in lengths]}
    _write_records(folder / "prompts.jsonl", **columns)
    _write_records(folder / "demonstrations.jsonl", **columns, completion=responses())
    _write_records(folder / "comparisons.jsonl", **columns, chosen=responses(), rejected=responses())


def _write_adapter(folder: Path, lora: dict[str, Any], tokenizer: Any) -> None:
    import torch

    from rlhf.models.adapters import LoRA
    from rlhf.models.networks import AdaptedNetworks

    networks = AdaptedNetworks(torch.float32, torch.device("cpu"), 1, LoRA(**lora), None)
    networks.scalar_model(str(folder / "policy"), "policy", trained=True).save(folder / "reward", tokenizer)


def _write_records(file: Path, **columns: list[str]) -> None:
    rows = zip(*columns.values(), strict=True)
    file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


def config_of(shape: Shape) -> Any:
    """Returns the config of both models."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.hidden, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=0, pad_token_id=shape.pad_id, num_labels=1,
    )  # fmt: skip


def _tokenizer(shape: Shape) -> Any:
    """Makes a tokenizer with one word per id: EOS, w1, w2, ..., [PAD]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    vocabulary = {end: 0, **{f"w{n}": n for n in range(1, shape.pad_id)}, "[PAD]": shape.pad_id}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end, pad_token="[PAD]"
    )


def _set_length(policy: Any, shape: Shape, regime: Regime) -> None:
    """Puts the length of the responses into the weights."""
    import torch

    norm, output = policy.gpt_neox.final_layer_norm, policy.get_output_embeddings().weight
    norm.weight[-1], norm.bias[-1] = 0, 1
    output[:, -1] = 0
    output[shape.pad_id, -1] = NEVER
    output[0] = 0
    hidden = torch.nn.functional.layer_norm(torch.randn(256, shape.hidden), (shape.hidden,))
    hidden[:, -1] = 1
    others = torch.logsumexp((hidden @ output.T)[:, 1:] / TEMPERATURE, -1).mean().item()
    output[0, -1] = NEVER if regime == "full" else TEMPERATURE * (others + math.log(END / (1 - END)))


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    write(Path(sys.argv[1]), Shape(**settings.pop("shape")), **settings)
