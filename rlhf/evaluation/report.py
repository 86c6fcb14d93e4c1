"""The report of a finished pipeline: one page, a table, plots, samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import run_folder
from rlhf.callbacks.accuracy import accuracy_table
from rlhf.callbacks.export import is_complete
from rlhf.data.records import Source
from rlhf.data.texts import TextFormat
from rlhf.errors import UserError
from rlhf.evaluation.curves import read_curves
from rlhf.evaluation.generate import responses
from rlhf.evaluation.margins import comparison_margins
from rlhf.evaluation.plots import Curves, plot_curves
from rlhf.evaluation.statistics import win_rate
from rlhf.rouge import rouge

if TYPE_CHECKING:
    import pandas as pd

SFT_PANELS = [("Loss", ["loss/sft_step", "validation/loss"]), ("ROUGE on validation", [
    "validation/rouge1", "validation/rouge2", "validation/rougeL"])]  # fmt: skip
REWARD_PANELS = [("Loss", ["loss/reward_step", "validation/loss"]), ("Accuracy", [
    "validation/accuracy", "validation_cnndm/accuracy"])]  # fmt: skip
PPO_PANELS = [
    ("Score of the reward model", ["objective/scores", "validation/score"]),
    ("KL to the reference (nats per response)", ["objective/kl"]),
    ("Ratio", ["val/ratio"]),
    ("Largest |ratio - 1| before the first step", ["val/ratio_max_deviation"]),
    ("Gold score on validation", ["validation/gold_scores"]),
]


def report(
    output: str,
    sft: str,
    reward: str,
    ppo: str,
    data: Source,
    comparisons: Source | None = None,
    text: TextFormat = TextFormat(),
    comparison_text: TextFormat = TextFormat(max_response_length=169),
    response_length: int = 53,
    temperature: float = 0.01,
    samples: int = 5,
    batch_size: int = 64,
) -> None:
    """Write report.md, PNG plots and the tables behind them for a finished pipeline.

    Args:
        output: the folder to write to.
        sft: run folder of the SFT stage.
        reward: run folder of the reward stage.
        ppo: run folder of the PPO stage.
        data: demonstrations of the validation split, to generate for and compare with.
        comparisons: comparisons of the validation split, to measure the reward model on.
        text: formats and maximum lengths of the demonstrations.
        comparison_text: the same of the comparisons.
        response_length: longest response in tokens.
        temperature: of the generated responses.
        samples: how many sample summaries to show.
        batch_size: rows that go through a model at a time.
    """
    folders = {"sft": Path(sft), "reward": Path(reward), "ppo": Path(ppo)}
    for name, folder in folders.items():
        if not is_complete(folder / "export"):
            raise UserError(f"{name}: {folder} has no finished export; run that stage first.")
    out = run_folder.claim(output, resuming=True)
    reward_export = str(folders["reward"] / "export")
    tables = {}
    for label, name in (("SFT", "sft"), ("PPO", "ppo")):
        export = str(folders[name] / "export")
        tables[label] = responses(
            export, data, text, response_length, temperature, batch_size, reward=reward_export
        ).rename(columns={"tokens": "length"})
    reference_scores = tables["SFT"]["reference_score"].tolist()
    summary = summarise(tables, reference_scores)
    curves = {name: read_curves(folder) for name, folder in folders.items()}
    pairs = None if comparisons is None else comparison_margins(reward_export, comparisons, comparison_text, batch_size)
    sections = [
        "# Report",
        "## SFT, PPO and the reference",
        _markdown(summary),
        _progress(tables),
        "## Supervised fine-tuning",
        *_figure(curves["sft"], SFT_PANELS, "optimizer steps", out / "sft.png"),
        "## Reward model",
        *_reward_section(pairs, out),
        *_figure(curves["reward"], REWARD_PANELS, "optimizer steps", out / "reward.png"),
        "## PPO",
        *_figure(curves["ppo"], PPO_PANELS, "episodes", out / "ppo.png"),
        _invariants(curves["ppo"]),
        "## Samples",
        _samples(tables, samples),
    ]
    for label, table in tables.items():
        table.drop(columns="record").to_csv(out / f"responses_{label.lower()}.csv", index=False)
    summary.to_csv(out / "summary.csv", index=False)
    (out / "report.md").write_text("\n\n".join(sections) + "\n")
    _print(summary)


def summarise(tables: dict[str, pd.DataFrame], reference_scores: list[float]) -> pd.DataFrame:
    """A row for each policy and one for the reference.

    Args:
        tables: policy -> rows with `response`, `reference`, `score`, `length`, `has_eos` and maybe `gold`.
        reference_scores: score of the reference of each row.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for label, table in tables.items():
        row: dict[str, Any] = {"policy": label, "score": table["score"].mean(), "score_std": table["score"].std()}
        if "gold" in table:
            wins = win_rate(table["gold"].tolist(), table["gold_reference"].tolist())
            judge = "gold score"
            row |= {"gold": table["gold"].mean()}
        else:
            wins = win_rate(table["score"].tolist(), reference_scores)
            judge = "reward model"
        interval = f"{wins.rate:.3f} ({wins.low:.3f} to {wins.high:.3f})"
        row |= {f"win rate vs reference ({judge})": interval, "win_rate": wins.rate}
        row |= {"rougeL": rouge(table["response"].tolist(), table["reference"].tolist())["rougeL"]}
        row |= {"eos": table["has_eos"].mean(), "length": table["length"].mean()}
        rows.append(row)
    first = next(iter(tables.values()))
    scores = pd.Series(reference_scores)
    rows.append({"policy": "reference", "score": scores.mean(), "score_std": scores.std()})
    if "gold" in first:
        rows[-1]["gold"] = first["gold_reference"].mean()
    return pd.DataFrame(rows)


def _progress(tables: dict[str, pd.DataFrame]) -> str:
    sft, ppo = tables["SFT"], tables["PPO"]
    gain = (ppo["score"].mean() - sft["score"].mean()) / sft["score"].std()
    text = f"PPO raised the mean score by {gain:.2f} standard deviations of the SFT scores"
    if "gold" in sft:
        text += f", and the gold score by {ppo['gold'].mean() - sft['gold'].mean():.2f}"
    return f"{text}, on {len(sft)} validation prompts. Win rates count ties as half; intervals are 95%."


def _reward_section(pairs: pd.DataFrame | None, out: Path) -> list[str]:
    if pairs is None:
        return []
    table = accuracy_table(pairs.to_dict("records"))
    table.to_csv(out / "reward_accuracy.csv", index=False)
    shown = table[table["group"] == "all"].drop(columns=["group", "value"]).assign(labels="as given")
    if "gold_margin" in pairs:
        clean = pairs.assign(margin=pairs["margin"] * pairs["gold_margin"])  # right where both agree on the winner
        rows = accuracy_table(clean.assign(batch=None, confidence=None).to_dict("records"))
        import pandas as pd

        shown = pd.concat([shown, rows.drop(columns=["group", "value"]).assign(labels="clean (gold score)")])
    return ["Accuracy on validation pairs, with 95% intervals. `news` is out of distribution.", _markdown(shown)]


def _invariants(curves: Curves) -> str:
    lines = []
    if "val/ratio_max_deviation" in curves:
        worst = curves["val/ratio_max_deviation"].max()
        lines.append(f"- Largest |ratio - 1| before the first step of any update: {worst:.2g}")
    if "objective/kl" in curves:
        kl = curves["objective/kl"]
        lines.append(
            f"- KL: {kl.iloc[0]:.2g} in the first update, {kl.iloc[-1]:.3g} in the last, {kl.max():.3g} at most"
        )
    if "rollout/eos_share" in curves:
        lines.append(f"- Responses with EOS in the last update: {curves['rollout/eos_share'].iloc[-1]:.1%}")
    return "\n".join(lines)


def _samples(tables: dict[str, pd.DataFrame], count: int) -> str:
    blocks = []
    for index in range(min(count, len(tables["SFT"]))):
        row = tables["SFT"].iloc[index]
        query = "> " + row["query"].strip().replace("\n", "\n> ")
        lines = [
            f"- **{label}** ({t['score'].iloc[index]:.2f}): {t['response'].iloc[index].strip()}"
            for label, t in tables.items()
        ]
        blocks.append("\n".join([query, "", *lines, f"- **reference**: {row['reference'].strip()}"]))
    return "\n\n".join(blocks)


def _figure(curves: Curves, panels: Any, x_label: str, file: Path) -> list[str]:
    return [f"![{file.stem}]({file.name})"] if plot_curves(curves, panels, x_label, file) else []


def _markdown(table: pd.DataFrame) -> str:
    table = table.drop(columns="win_rate", errors="ignore")
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"
    return "" if value is None else str(value)


def _print(table: pd.DataFrame) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = table.drop(columns="win_rate", errors="ignore")
    rich_table = Table(*map(str, shown.columns))
    for row in shown.itertuples(index=False):
        rich_table.add_row(*(_cell(value) for value in row))
    Console().print(rich_table)
