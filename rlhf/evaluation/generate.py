"""Responses of a policy to every query of a split, as a table."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
import torch
from pydantic import PositiveInt

from rlhf import files
from rlhf.data.chat import refuse_conversations
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_demonstrations
from rlhf.errors import Positive, Seed, UserError
from rlhf.evaluation.best_of_n import best_of_n, check_best_of, describe, sampled_ids
from rlhf.evaluation.log_ratios import log_ratios
from rlhf.evaluation.resumable import Parts, Row, ranks
from rlhf.evaluation.reward_scorer import RewardScorer, gold_columns, whole_sequences
from rlhf.hardware import Precision, best_device, weights_precision
from rlhf.models.classifiers import register_classifier
from rlhf.models.loading import (
    check_context,
    check_language_model,
    check_reward_model,
    load_causal_lm,
    load_config,
    model_fingerprint,
)
from rlhf.models.tokenizers import (
    PAD_TOKEN,
    check_reference,
    check_row,
    decode_responses,
    eos_ids,
    load_tokenizer,
    same_tokens,
)
from rlhf.ops.sequences import pad_sequences, response_lengths
from rlhf.sampling.engines import SamplerName
from rlhf.sampling.responses import Drawn
from rlhf.sampling.sampler import Decoding, sample, uniforms
from rlhf.sampling.vllm_engine import check_vllm
from rlhf.sampling.vllm_process import CACHE_GIB
from rlhf.sampling.vllm_sampler import VLLMSampler, check_temperature
from rlhf.seeding import derive_seed


def generate(
    output: str,
    model: str,
    data: Source,
    text: TextFormat = TextFormat(),
    response_length: PositiveInt = 53,
    temperature: Positive | None = None,
    batch_size: PositiveInt = 64,
    seed: Seed = 1,
    reward: str | None = None,
    best_of: PositiveInt = 1,
    reference: str | None = None,
    eos_tokens: list[str] | None = None,
    precision: Precision = "auto",
    sampler: SamplerName = "builtin",
    vllm_cache_gib: Positive = CACHE_GIB,
) -> pd.DataFrame:
    """Writes the responses of a policy to every query of a split to one table.

    A killed run resumes after its last whole batch, and several processes share the batches when `torchrun` starts
    them. The table depends on neither, and on `batch_size` by rounding only: each response has its own random numbers.
    A finished table is kept. Its columns are described in docs/evaluation.md.

    Args:
        output: file of the table, ends in .parquet or .csv.
        model: the policy: folder of an export, or a name on the hub.
        data: demonstrations (or prompts); `split` says which split.
        text: formats and maximum lengths.
        response_length: longest response in tokens.
        temperature: temperature of the sampling; by default 0.01, and 0.7 with `best_of`, whose samples must differ.
        batch_size: rows that go through a model at a time.
        seed: seed of the sampling.
        reward: export of a reward model, for the columns `score` and `reference_score`.
        best_of: how many responses are drawn to each query; the one that `reward` scores highest is kept.
        reference: a policy with the same tokens, for the column `kl`, the log-ratio of the two.
        eos_tokens: tokens that end a response; by default the tokenizer's own and those of the model's
            `generation_config.json`.
        precision: of the weights of both models; `auto` is bfloat16 on GPUs and float32 on CPUs.
        sampler: `builtin`, or `vllm` (docs/vllm.md).
        vllm_cache_gib: with `vllm`, memory of its cache of keys and values, in GiB.
    """
    temperature = temperature or (0.01 if best_of == 1 else 0.7)
    check_sampler(sampler, vllm_cache_gib, temperature)
    tokenizer = check_models(model, reward, eos_tokens)
    check_best_of(best_of, reward, reference)
    if reference is not None:
        check_reference(reference, "reference", tokenizer)
    with ranks(output) as processes:
        with processes.first_alone():
            records = load_demonstrations(data, "data", tokenizer, text, need_response=False).to_list()
        check_records(records, model, tokenizer, response_length, reward)
        rows = _one_per_query(records, f"{data.path} ({data.split})", verbose=processes.rank == 0)
        sampling: dict[str, Any] = {"response_length": response_length, "temperature": temperature, "seed": seed}
        sampling["precision"] = weights = weights_precision(precision)
        settings = {
            **_fingerprints(rows, model=model, reward=reward),
            "text": asdict(text),
            **sampling,
            "eos": [*eos_ids(tokenizer)],
            **({"sampler": sampler} if sampler != "builtin" else {}),
            **({"best_of": best_of} if best_of > 1 else {}),
            **({"reference": model_fingerprint(reference, "reference")} if reference is not None else {}),
        }
        parts = Parts(output, settings, rows, batch_size, processes)
        answer = partial(_sampler, sampler, vllm_cache_gib, model, tokenizer, **sampling)
        load = partial(
            RewardScorer, str(reward), "reward", batch_size, tokenizer, text.special_tokens == "control", weights
        )
        if best_of > 1:
            parts.make("responses", f"Best of {best_of} by {model}", lambda: best_of_n(answer(), load(), best_of))
        else:
            parts.make("responses", f"Generating with {model}", answer)
        if reward is not None:
            parts.make("scores", f"Scoring with {reward}", lambda: partial(_scores, load(), tokenizer))
        if reference is not None:
            ratios = partial(log_ratios, model, reference, tokenizer.pad_token_id, temperature, weights)
            parts.make("kl", f"Log-ratios to {reference}", ratios)
        table = parts.merge(finish=_with_gold)
        if best_of > 1 and processes.rank == 0:
            print(describe(table, best_of))
        return table


def check_models(model: str, reward: str | None, eos_tokens: list[str] | None) -> Any:
    """Refuses models that cannot generate and score, and returns the tokenizer; no weights are loaded."""
    check_language_model(model, "model")
    if reward is not None:
        register_classifier(check_reward_model(reward, "reward"), "reward")
    return load_tokenizer(model, PAD_TOKEN, "model", eos_tokens)


def check_records(records: list[Row], model: str, tokenizer: Any, response_length: int, reward: str | None) -> None:
    """Refuses records that the models cannot read."""
    longest = max(len(row["query_ids"]) for row in records) + response_length
    what = f"response_length: the longest query with a response of {response_length} tokens"
    advice = "lower response_length or text.max_query_length"
    config = load_config(model, "model")
    check_context(config, longest, what, advice)
    largest = max(max(row["query_ids"], default=0) for row in records)
    check_row(largest, config.get_text_config().vocab_size, tokenizer, model, "data")
    if reward is not None and not same_tokens(tokenizer, load_tokenizer(reward, PAD_TOKEN, "reward")):
        refuse_conversations((row["record"] for row in records), "reward")


def _fingerprints(rows: list[Row], **models: str | None) -> dict[str, str | None]:
    """Returns what tells the data and the models of a table from others, by their settings."""
    names = ("query", "reference", "record", "query_ids", "input_ids")
    found = {name: None if path is None else model_fingerprint(path, name) for name, path in models.items()}
    return {"data": files.fingerprint(str(row[name]) for row in rows for name in names), **found}


def _one_per_query(records: list[Row], data: str, verbose: bool) -> list[Row]:
    """Numbers the rows, after leaving out all but the first of each query."""
    first: dict[str, Row] = {}
    for record in records:
        first.setdefault(record["query"], record)
    if verbose and len(first) < len(records):
        print(f"data: {len(records) - len(first)} records of {data} repeat the query of an earlier one; left out.")
    return [{**row, "number": number} for number, row in enumerate(first.values())]


def check_sampler(sampler: SamplerName, vllm_cache_gib: float, temperature: float | None) -> None:
    """Refuses a sampler that is not installed, and settings that it does not follow."""
    if sampler == "builtin" and vllm_cache_gib != CACHE_GIB:
        raise UserError("vllm_cache_gib is for sampler vllm, not for the built-in one; leave it out.")
    if sampler == "vllm":
        check_vllm("sampler")
        if temperature is not None:
            check_temperature(temperature, "temperature")


def _sampler(
    sampler: SamplerName,
    cache_gib: float,
    path: str,
    tokenizer: Any,
    response_length: int,
    temperature: float,
    seed: int,
    precision: str,
) -> Callable[..., pd.DataFrame]:
    draw: Callable[..., Drawn] = sample
    device = best_device()
    if sampler == "vllm":  # it has the weights on the device itself, and ends with this step
        otherwise = "without sampler vllm the built-in one makes another output"
        draw = VLLMSampler(cache_gib, ("sampler", "vllm_cache_gib"), otherwise, device, fixed=True)
        device = torch.device("cpu")
    decoding = Decoding(temperature, eos_ids(tokenizer), tokenizer.pad_token_id)
    model: Any = load_causal_lm(path, "model", getattr(torch, precision)).to(str(device)).eval()  # type: ignore[arg-type]

    def respond(rows: list[Row], number: int = 0) -> pd.DataFrame:
        ids, mask = pad_sequences([row["query_ids"] for row in rows], tokenizer.pad_token_id, "left")
        # on the CPU, so that they are the same on every device
        seeds = [derive_seed(seed, row["number"], *([number] if number else [])) for row in rows]
        generators = [torch.Generator().manual_seed(own) for own in seeds]
        drawn = torch.cat([uniforms(1, response_length, generator) for generator in generators])
        found = draw(model, ids.to(device), mask.to(device), drawn.to(device), decoding)
        sampled = found[0] if isinstance(found, tuple) else found
        lengths, has_eos = (x.tolist() for x in response_lengths(sampled, eos_ids(tokenizer)))
        tokens = [row[:length] for row, length in zip(sampled.tolist(), lengths, strict=True)]
        return pd.DataFrame({
            "id": [_id_of(row) for row in rows],
            "query": [row["query"] for row in rows],
            "response": decode_responses(tokenizer, [row["query_ids"] for row in rows], tokens),
            "reference": [row["reference"] for row in rows],
            "tokens": lengths,
            "reference_tokens": [_reference_tokens(row) for row in rows],
            "has_eos": has_eos,
            "record": [row["record"] for row in rows],
            "response_ids": tokens,
        })  # fmt: skip

    return respond


def _reference_tokens(row: Row) -> int:
    return len(row["input_ids"]) - row["response_start"] if row["reference"] else 0


def _id_of(row: Row) -> str:
    known = json.loads(row["record"]).get("id")
    return str(row["number"] if known is None else known)


def _scores(scorer: RewardScorer, tokenizer: Any, rows: list[Row]) -> pd.DataFrame:
    scores = scorer.score_ids(sampled_ids(rows, [row["response_ids"] for row in rows]))  # as PPO does
    references = scorer.score_ids(whole_sequences(tokenizer, rows, "input_ids", "reference", scorer.control))
    there = [bool(row["reference"]) for row in rows]  # of mere prompts there is none
    return pd.DataFrame({"score": scores, "reference_score": pd.Series(references, dtype=float).where(there)})


def _with_gold(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the gold scores of embedded data, moves `record` to the end, and drops what only other steps need."""
    gold = gold_columns(table, gold="response", gold_reference="reference")
    return table.drop(columns=["record", "response_ids"]).assign(**gold, record=table["record"])
