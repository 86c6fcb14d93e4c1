"""What a page says first: a sentence, and four numbers."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from rlhf.report.runs import PPO, REFERENCE, SFT

NAMES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "dpo": "DPO", "ppo": PPO}
LATEST = {
    "sft": {"Loss on validation": "validation/loss", "ROUGE-L on validation": "validation/rougeL"},
    "reward": {"Loss on validation": "validation/loss", "Accuracy on validation": "validation/accuracy"},
    "dpo": {"Loss on validation": "validation/loss", "Accuracy on validation": "validation/accuracy"},
    "ppo": {
        "Score on validation": "validation/score", "Gold score on validation": "validation/gold_scores",
        "KL": "objective/kl",
    },
}  # fmt: skip
NAMED = 4  # runs whose win rates all stand in the sentence


class Number(NamedTuple):
    """A number as it is shown, what it is, and what stands beside it."""

    name: str
    value: str
    note: str


def headline(tables: Mapping[str, pd.DataFrame]) -> tuple[str, list[Number]]:
    """Says of the largest size how often its policies win, or how often each named run does, in words and four numbers.

    Numbers are means over seeds; of several runs, those of the last one. A page without judged tables has a sentence
    only.
    """
    summary = tables.get("summary", pd.DataFrame())
    if summary.empty:
        return _in_training(tables)
    sizes = list(summary["size"].unique())
    own = summary[summary["size"] == sizes[-1]]
    rows = {str(policy): part for policy, part in own.groupby("policy", sort=False)}
    means = own.groupby("policy", sort=False).mean(numeric_only=True)
    rates = means["win_rate"].dropna() if "win_rate" in means else pd.Series(dtype=float)
    if rates.empty:
        return "The judge gave no answer", []
    best = PPO if PPO in rates else str(rates.index[-1])
    numbers = [Number("Win rate", f"{rates[best]:.1%}", _spread(rows[best]))]
    for name, column in (("Score", "score"), ("Gold score", "gold")):
        if column in means and pd.notna(means.loc[best, column]):
            before = means.loc[SFT, column] if SFT in means.index and best != SFT else float("nan")
            note = f"{SFT}: {before:.2f}" if pd.notna(before) else f"mean of {best}"
            numbers.append(Number(name, f"{means.loc[best, column]:.2f}", note))
    found = tables.get("reward_agreement", pd.DataFrame())
    if "gold" not in means and len(found):
        found = found[(found["size"] == sizes[-1]) & (found["policy"] == best)]["agreement"].mean()
        if pd.notna(found):
            numbers.append(Number("Reward model and judge agree", f"{found:.1%}", f"on {best}'s responses"))
    numbers += _kl(tables, own)
    if len(sizes) > 1:
        numbers = [number._replace(name=f"{number.name}, {sizes[-1]}") for number in numbers]
    reference = str(own["policy"].iloc[-1])
    over = f"the {REFERENCE}" if reference == REFERENCE else reference
    others = ", ".join(f"{name}'s {rate:.0%}" for name, rate in rates.items() if name != best)
    others = others and f"; {others}"
    if len(sizes) == 1:
        said = f"{rates[best]:.0%} of the time{others}"
    elif summary["parameters"].nunique() > 1:
        said = f"{rates[best]:.0%} of the time (size {sizes[-1]}){others}"
    else:
        said = _in_each_run(summary[summary["policy"] == best])
    return f"{best}'s responses are preferred over {over} {said}", numbers


def _in_training(tables: Mapping[str, pd.DataFrame]) -> tuple[str, list[Number]]:
    """Says how far the only run is, with what it has measured last."""
    progress = tables.get("progress", pd.DataFrame())
    if progress.empty or progress[["size", "seed"]].drop_duplicates().shape[0] > 1:
        return "Nothing is judged yet", []
    last, numbers = progress.iloc[-1], []
    curves = tables.get(f"{last['stage']}_curves", pd.DataFrame())
    for name, curve in LATEST[last["stage"]].items() if len(curves) else ():
        values = curves[curves["curve"] == curve]["value"]
        if len(values):
            numbers.append(Number(name, f"{values.iloc[-1]:.2f}", f"at first {values.iloc[0]:.2f}"))
    unit = "episodes" if last["stage"] == "ppo" else "steps"
    total = "" if pd.isna(last["of"]) else f" of {last['of']}"
    return f"{NAMES[last['stage']]}: {last['steps']}{total} {unit}; nothing is judged yet", numbers


def _in_each_run(rows: pd.DataFrame) -> str:
    rates = rows.groupby("size", sort=False)["win_rate"].mean().dropna()
    if len(rates) > NAMED:
        return f"{rates.min():.0%} to {rates.max():.0%} of the time in {len(rates)} runs"
    return ", ".join(f"{rate:.0%} in {name}" for name, rate in rates.items()).replace("%", "% of the time", 1)


def _spread(rows: pd.DataFrame) -> str:
    if len(rows) > 1:
        return f"{rows['win_rate'].min():.1%} to {rows['win_rate'].max():.1%} over {len(rows)} seeds"
    return f"95% interval {rows['low'].iloc[0]:.1%} to {rows['high'].iloc[0]:.1%}"


def _kl(tables: Mapping[str, pd.DataFrame], own: pd.DataFrame) -> list[Number]:
    found = tables.get("invariants", pd.DataFrame())
    if "last KL" not in found:
        return []
    kl = found[found["size"] == own["size"].iloc[0]]["last KL"].mean()
    return [Number("KL", f"{kl:.2f}", "nats per response, last update")] if pd.notna(kl) else []
