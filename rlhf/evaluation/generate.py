"""Responses of a policy to every query of a split, as a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.checks import above, at_least
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_demonstrations
from rlhf.errors import UserError
from rlhf.evaluation import fingerprints
from rlhf.evaluation.resumable import Parts, Ranks, count_of, ranks, slice_of
from rlhf.evaluation.reward_scorer import RewardScorer, best_device, gold_columns
from rlhf.evaluation.tables import claim, read_table
from rlhf.models.loading import (
    PAD_TOKEN,
    check_language_model,
    check_reward_model,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from rlhf.ops.sequences import pad_sequences, response_lengths
from rlhf.sampling.sampler import Decoding, sample, uniforms
from rlhf.seeding import derive_seed

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]


def generate(
    output: str,
    model: str,
    data: Source,
    text: TextFormat = TextFormat(),
    response_length: int = 53,
    temperature: float = 0.01,
    batch_size: int = 64,
    seed: int = 1,
    reward: str | None = None,
) -> pd.DataFrame:
    """Write the responses of a policy to every query of a split to one table.

    A killed run goes on from its last whole batch, and several processes share the batches when `torchrun` starts them.
    The table depends on neither, and on `batch_size` by rounding only: a response has random numbers of its own. A
    finished table is kept.

    Args:
        output: file of the table, ends in .parquet or .csv.
        model: the policy: folder of an export, or a name on the hub.
        data: demonstrations (or prompts); `split` says which split.
        text: formats and maximum lengths.
        response_length: longest response in tokens.
        temperature: of the sampling.
        batch_size: rows that go through a model at a time.
        seed: of the sampling.
        reward: export of a reward model, for the columns `score` and `reference_score`.

    Returns:
        The table, a row per query: `id`, `query`, `response`, `reference` (texts), `tokens`, `reference_tokens` (with
        EOS), `has_eos`, `record` (JSON); with a reward model `score` and `reference_score`; on embedded data `gold` and
        `gold_reference`.
    """
    _check(model, response_length, temperature, batch_size, reward)
    file = Path(output)
    with ranks() as processes:
        policy = _Policy(model, data, text, response_length, temperature, batch_size, seed, processes)
        settings = policy.settings() | {"reward": None if reward is None else fingerprints.of_model(reward, "reward")}
        if claim(file, settings, write=processes.rank == 0):
            if processes.rank == 0:
                print(f"{file} is finished, with these settings; it is kept.")
            return read_table(file, "output")
        parts = Parts(file, len(policy.rows), batch_size, processes)
        parts.make("responses", f"Generating with {model}", policy.load)
        steps = ["responses"]
        if reward is not None:
            parts.make("scores", f"Scoring with {reward}", lambda: _scores_of(reward, parts, batch_size))
            steps.append("scores")
        table = parts.merge(*steps, finish=_with_gold)
        if processes.rank == 0:
            print(f"{len(table)} responses: {file}")
        return table


def responses(
    model: str,
    data: Source,
    text: TextFormat = TextFormat(),
    response_length: int = 53,
    temperature: float = 0.01,
    batch_size: int = 64,
    seed: int = 1,
    reward: str | None = None,
) -> pd.DataFrame:
    """The table of `generate`, in this process and without a file."""
    import pandas as pd
    from rich.progress import track

    _check(model, response_length, temperature, batch_size, reward)
    policy = _Policy(model, data, text, response_length, temperature, batch_size, seed, Ranks())
    make = policy.load()
    numbers = track(range(count_of(len(policy.rows), batch_size)), f"Generating with {model}", transient=True)
    table = pd.concat([make(number) for number in numbers], ignore_index=True)
    if reward is not None:
        table = table.assign(**_scores(RewardScorer(reward, "reward", batch_size), table))
    return _with_gold(table)


def _check(model: str, response_length: int, temperature: float, batch_size: int, reward: str | None) -> None:
    """Refuse what could only fail later."""
    at_least("response_length", response_length, 1)
    above("temperature", temperature, 0)
    at_least("batch_size", batch_size, 1)
    check_language_model(load_config(model, "model"), model, "model")
    if reward is not None:
        check_reward_model(load_config(reward, "reward"), reward, "reward")


class _Policy:
    """A policy and the queries that it answers, in parts of a batch."""

    def __init__(
        self,
        model: str,
        data: Source,
        text: TextFormat,
        response_length: int,
        temperature: float,
        batch_size: int,
        seed: int,
        processes: Ranks,
    ) -> None:
        self.model, self.response_length, self.temperature = model, response_length, temperature
        self.batch_size, self.seed, self.text = batch_size, seed, text
        self.tokenizer = load_tokenizer(model, PAD_TOKEN, setting="model")
        with processes.first_alone():
            rows = load_demonstrations(data, "data", self.tokenizer, text, need_response=False).to_list()
        self.rows = _one_per_query(rows, data, processes.rank == 0)
        self._check_context()

    def settings(self) -> dict[str, Any]:
        """All that the responses depend on."""
        contents = (row[column] for row in self.rows for column in ("query", "reference", "record"))
        return {
            "model": fingerprints.of_model(self.model, "model"),
            "data": fingerprints.of_texts(contents),
            "text": asdict(self.text),
            "response_length": self.response_length,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def load(self) -> Callable[[int], pd.DataFrame]:
        """Load the model; what is returned makes the rows of a part."""
        device = best_device()
        model: Any = load_causal_lm(self.model, "model").to(str(device)).eval()  # type: ignore[arg-type]
        return lambda number: self._part(model, device, number)

    def _part(self, model: Any, device: torch.device, number: int) -> pd.DataFrame:
        import pandas as pd

        rows, tokenizer, first = slice_of(self.rows, number, self.batch_size), self.tokenizer, number * self.batch_size
        ids, mask = pad_sequences([row["query_ids"] for row in rows], tokenizer.pad_token_id, "left")
        numbers, decoding = self._random(first, len(rows)).to(device), Decoding.of(tokenizer, self.temperature)
        tokens = sample(model, ids.to(device), mask.to(device), numbers, decoding)
        lengths, has_eos = response_lengths(tokens, tokenizer.eos_token_id)
        return pd.DataFrame({
            "id": [_id_of(row, index) for index, row in enumerate(rows, first)],
            "query": [row["query"] for row in rows],
            "response": tokenizer.batch_decode(tokens, skip_special_tokens=True),
            "reference": [row["reference"] for row in rows],
            "tokens": lengths.tolist(),
            "reference_tokens": [len(row["input_ids"]) - row["response_start"] for row in rows],
            "has_eos": has_eos.tolist(),
            "record": [row["record"] for row in rows],
        })  # fmt: skip

    def _random(self, first: int, count: int) -> torch.Tensor:
        """Random numbers of rows, for each from (seed, number of the row), made on the CPU, `(count, R)`."""
        generators = (torch.Generator().manual_seed(derive_seed(self.seed, first + n)) for n in range(count))
        return torch.cat([uniforms(1, self.response_length, generator) for generator in generators])

    def _check_context(self) -> None:
        """Refuse queries that leave no room for a response."""
        context = getattr(load_config(self.model, "model"), "max_position_embeddings", None)
        longest = max(len(row["query_ids"]) for row in self.rows) + self.response_length
        if context is not None and longest > context:
            raise UserError(
                f"response_length: the longest query and a response of {self.response_length} tokens have {longest} "
                f"tokens, more than the {context} positions of {self.model}; lower response_length or "
                "text.max_query_length."
            )


def _one_per_query(rows: list[Row], data: Source, speaking: bool) -> list[Row]:
    """The first row of each query."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["query"], row)
    if speaking and len(first) < len(rows):
        copies = len(rows) - len(first)
        print(f"data: {data.path} ({data.split}) has {copies} records whose query an earlier one has; left out.")
    return list(first.values())


def _id_of(row: Row, index: int) -> str:
    known = json.loads(row["record"]).get("id")
    return str(index) if known is None else str(known)


def _scores_of(reward: str, parts: Parts, batch_size: int) -> Callable[[int], pd.DataFrame]:
    import pandas as pd

    scorer = RewardScorer(reward, "reward", batch_size)
    return lambda number: pd.DataFrame(_scores(scorer, parts.read("responses", number)))


def _scores(scorer: RewardScorer, table: pd.DataFrame) -> dict[str, list[float]]:
    queries = table["query"].tolist()
    return {
        "score": scorer(queries, table["response"].tolist()),
        "reference_score": scorer(queries, table["reference"].tolist()),
    }


def _with_gold(table: pd.DataFrame) -> pd.DataFrame:
    """With the gold scores of embedded data; `record` stands last."""
    records = [json.loads(record) for record in table["record"]]
    texts = {"gold": table["response"].tolist(), "gold_reference": table["reference"].tolist()}
    gold = gold_columns(table["query"].tolist(), records, **texts)
    return table.drop(columns="record").assign(**gold, record=table["record"])
