"""What a page says first: a sentence, and four numbers."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from rlhf.report.runs import PPO, SFT


class Number(NamedTuple):
    """A number as it is shown, what it is, and what stands beside it."""

    name: str
    value: str
    note: str


def headline(tables: Mapping[str, pd.DataFrame]) -> tuple[str, list[Number]]:
    """Says of the last size, or of the last named run, how often its policies win, in words and in four numbers.

    Numbers are means over seeds. A page without judged tables has a sentence only.
    """
    summary = tables.get("summary", pd.DataFrame())
    if summary.empty:
        return "Nothing is judged yet", []
    own = summary[summary["size"] == summary["size"].iloc[-1]]
    rows = {str(policy): part for policy, part in own.groupby("policy", sort=False)}
    means = own.groupby("policy", sort=False).mean(numeric_only=True)
    rates = means["win_rate"].dropna() if "win_rate" in means else pd.Series(dtype=float)
    if rates.empty:
        return "The judge gave no answer", []
    best = PPO if PPO in rates else str(rates.index[-1])
    others = [f"{name}'s {rate:.0%}" for name, rate in rates.items() if name != best]
    where = f" (size {own['size'].iloc[0]})" if summary["size"].nunique() > 1 else ""
    sentence = f"{best}'s responses are preferred over the reference {rates[best]:.0%} of the time"
    sentence = f"{sentence}{where}" + (f"; {', '.join(others)}" if others else "")
    numbers = [Number("Win rate", f"{rates[best]:.1%}", _spread(rows[best]))]
    for name, column in (("Score", "score"), ("Gold score", "gold")):
        if column in means and pd.notna(means.loc[best, column]):
            before = means.loc[SFT, column] if SFT in means.index and best != SFT else float("nan")
            note = f"{SFT}: {before:.2f}" if pd.notna(before) else f"mean of {best}"
            numbers.append(Number(name, f"{means.loc[best, column]:.2f}", note))
    found = tables.get("reward_agreement", pd.DataFrame())
    if "gold" not in means and len(found):
        found = found[(found["size"] == own["size"].iloc[0]) & (found["policy"] == best)]["agreement"].mean()
        if pd.notna(found):
            numbers.append(Number("Reward model and judge agree", f"{found:.1%}", f"on {best}'s responses"))
    return sentence, [*numbers, *_kl(tables, own)]


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
