"""Tables of responses: generated, scored, judged. One row per query."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from rlhf.data.gold import gold_scores
from rlhf.data.processing import load_comparisons, load_demonstrations
from rlhf.data.records import Source
from rlhf.data.texts import TextFormat, encode
from rlhf.errors import UserError
from rlhf.generation import sample
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.scalar_model import ScalarModel
from rlhf.ops.sequences import pad_sequences, response_lengths

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".parquet", ".csv")
# Columns of text: in a CSV file an empty text, or the text "NA", is a text and no missing number.
TEXTS = frozenset({
    "id", "query", "response", "reference", "record", "a", "b", "a_name", "b_name", "judge", "a_first", "b_first",
    "split", "batch", "chosen_policy", "rejected_policy",
})  # fmt: skip


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generate(
    model_path: str,
    source: Source,
    text: TextFormat = TextFormat(),
    response_length: int = 53,
    temperature: float = 0.01,
    batch_size: int = 64,
    seed: int = 1,
) -> pd.DataFrame:
    """Responses of a policy to every query of a source.

    Returns:
        Columns `query`, `response`, `reference` (texts), `length` in tokens with EOS, `has_eos`, `record`.
    """
    import pandas as pd

    tokenizer = load_tokenizer(model_path, setting="model")
    rows = load_demonstrations(source, "data", tokenizer, text, need_response=False).to_list()
    device = best_device()
    model: Any = load_causal_lm(model_path, "model").to(str(device)).eval()  # type: ignore[arg-type]
    random = torch.Generator(device).manual_seed(seed)
    out: list[dict[str, Any]] = []
    for start in track(range(0, len(rows), batch_size), description=f"Generating with {model_path}", transient=True):
        part = rows[start : start + batch_size]
        ids, mask = pad_sequences([row["query_ids"] for row in part], tokenizer.pad_token_id, "left")
        responses = sample(
            model, ids.to(device), mask.to(device), max_new_tokens=response_length, temperature=temperature,
            eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, generator=random,
        )  # fmt: skip
        lengths, has_eos = response_lengths(responses, tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for row, response, length, ended in zip(part, texts, lengths.tolist(), has_eos.tolist(), strict=True):
            out.append({
                "query": row["query"], "response": response, "reference": row["reference"], "length": length,
                "has_eos": ended, "record": json.loads(row["record"]),
            })  # fmt: skip
    return pd.DataFrame(out)


@torch.no_grad()
def reward_scores(reward_path: str, queries: list[str], responses: list[str], batch_size: int = 64) -> list[float]:
    """The reward of each response, ended with EOS, to its query."""
    tokenizer = load_tokenizer(reward_path, setting="reward")
    device = best_device()
    model = ScalarModel.from_pretrained(reward_path, "reward").to(device).eval()
    pairs = list(zip(queries, responses, strict=True))
    sequences = [[*encode(tokenizer, q + r), tokenizer.eos_token_id] for q, r in pairs]
    scores: list[float] = []
    for start in range(0, len(sequences), batch_size):
        ids, mask = pad_sequences(sequences[start : start + batch_size], tokenizer.pad_token_id)
        scores += model.score(ids.to(device), mask.to(device)).tolist()
    return scores


def has_gold(table: pd.DataFrame) -> bool:
    """Whether the records have the hidden facts of the embedded data."""
    return "facts" in table["record"].iloc[0]


def add_gold(table: pd.DataFrame) -> pd.DataFrame:
    """With the columns `gold` and `gold_reference`."""
    queries, records = table["query"].tolist(), table["record"].tolist()
    return table.assign(
        gold=gold_scores(queries, table["response"].tolist(), records),
        gold_reference=gold_scores(queries, table["reference"].tolist(), records),
    )


def comparison_margins(reward_path: str, source: Source, text: TextFormat, batch_size: int = 64) -> pd.DataFrame:
    """Every pair of a source with the reward model's margin; with gold labels where the records have facts.

    Returns:
        Columns `split` (CNN/DM pairs apart), `batch`, `confidence`, `chosen_policy`, `rejected_policy`, `margin`
        (reward of the chosen minus that of the rejected response) and, on embedded data, `gold_margin`.
    """
    import pandas as pd

    tokenizer = load_tokenizer(reward_path, setting="reward")
    rows = load_comparisons(source, "comparisons", tokenizer, text).to_pandas()
    queries = rows["query"].tolist()
    chosen, rejected = rows["chosen_text"].tolist(), rows["rejected_text"].tolist()
    better = reward_scores(reward_path, queries, chosen, batch_size)
    worse = reward_scores(reward_path, queries, rejected, batch_size)
    table = pd.DataFrame({
        "split": ["news" if "cnndm" in batch else "posts" for batch in rows["batch"]],
        **{name: rows[name] for name in ("batch", "confidence", "chosen_policy", "rejected_policy")},
        "margin": [a - b for a, b in zip(better, worse, strict=True)],
    })  # fmt: skip
    records = [json.loads(record) for record in rows["record"]]
    if "facts" in records[0]:
        golds = zip(gold_scores(queries, chosen, records), gold_scores(queries, rejected, records), strict=True)
        table["gold_margin"] = [a - b for a, b in golds]
    return table


def read_table(path: str | Path, setting: str, needed: Sequence[str] = ()) -> pd.DataFrame:
    """A table from a Parquet or CSV file.

    Args:
        path: the file; its suffix says which of the two.
        setting: how the user names this table, for messages.
        needed: columns that it must have. Where `query` is one of them, no query may stand in two rows.

    Raises:
        UserError: the file is missing, can't be read, is empty, lacks a column, or has a query twice.
    """
    import pandas as pd

    file = Path(path)
    check_suffix(file, setting)
    if not file.is_file():
        raise UserError(f"{setting}: there is no table {file}.")
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else _read_csv(file)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are of these kinds
        raise UserError(f"{setting}: {file} can't be read as a table: {str(error).strip().splitlines()[0]}") from error
    missing = [column for column in needed if column not in table]
    if missing:
        raise UserError(f"{setting}: {file} lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    if table.empty:
        raise UserError(f"{setting}: {file} has no rows.")
    if "query" in needed and table["query"].duplicated().any():
        copies = table["query"][table["query"].duplicated()]
        raise UserError(
            f"{setting}: {file} has {len(copies)} rows with a query that stands in an earlier row, first in row "
            f"{table.index.get_loc(copies.index[0]) + 1}; keep one row per query."
        )
    return table


def _read_csv(file: Path) -> pd.DataFrame:
    import pandas as pd

    columns = pd.read_csv(file, nrows=0).columns
    return pd.read_csv(
        file,
        dtype={name: str for name in columns if name in TEXTS},
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in TEXTS},
        float_precision="round_trip",
    )


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table beside its place, and move it there when it is complete.

    Args:
        table: what to write; its index is left out.
        path: a file that ends in .parquet or .csv; folders on its way are made.
    """
    file = Path(path)
    check_suffix(file, "output")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    if file.suffix == ".parquet":
        table.to_parquet(partial, index=False)
    else:
        table.to_csv(partial, index=False)
    partial.replace(file)


def check_suffix(file: Path, setting: str) -> None:
    """Refuse what is named neither as a Parquet nor as a CSV file."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{setting}: {file} must end in {' or '.join(SUFFIXES)}.")
