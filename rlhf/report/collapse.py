"""The collapse alarm: runs that fell far below their siblings, and what sets their curves apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.report.curve_files import last_quarter

if TYPE_CHECKING:
    import pandas as pd

FAR = 0.15
SIGNS = {
    "KL": "objective/kl",
    "length": "rollout/response_length",
    "EOS share": "rollout/eos_share",
}
STAGE = {"PPO": "ppo"}


def collapse_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Every run against its siblings: the other seeds of the same size and policy.

    A run has fallen when its win rate is more than 0.15 below the median of its siblings, and its whole interval lies
    below the median of the lower ends of theirs. The median holds while fewer than half of the siblings have fallen
    too; the second condition keeps small tables from alarming by chance.

    Args:
        rates: as of `statistics.win_rates`.

    Returns:
        `size`, `parameters`, `policy`, `seed`, `win_rate`, `low`, `high`, `siblings` (how many), `median` (of their win
        rates, NaN without siblings), `fallen`.
    """
    import pandas as pd

    table = []
    for row in rates.itertuples(index=False):
        same = rates[(rates["size"] == row.size) & (rates["policy"] == row.policy) & (rates["seed"] != row.seed)]
        median, floor = same["win_rate"].median(), same["low"].median()
        fallen = bool(row.win_rate < median - FAR and row.high < floor)
        whose = row.size, row.parameters, row.policy, row.seed
        table.append((*whose, row.win_rate, row.low, row.high, len(same), median, fallen))
    names = ["policy", "seed", "win_rate", "low", "high", "siblings", "median", "fallen"]
    return pd.DataFrame(table, columns=["size", "parameters", *names])


def with_signs(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """With the mean of each curve of SIGNS over the last quarter of PPO; NaN where there is no such curve.

    Args:
        table: as of `collapse_table`.
        curves: as of `curves.curve_rows`.
    """
    finals = last_quarter(curves)
    for name, curve in SIGNS.items():
        own = finals[finals["curve"] == curve].set_index(["size", "seed", "stage"])["value"].to_dict()
        keys = zip(table["size"], table["seed"], table["policy"].map(STAGE), strict=True)
        table = table.assign(**{name: [own.get(key, float("nan")) for key in keys]})
    return table


def alarms(table: pd.DataFrame) -> list[str]:
    """Lists a sentence per fallen run, and what the fallen ones have in common; or says that none fell.

    Args:
        table: as of `with_signs`.
    """
    fallen = table[table["fallen"]]
    if fallen.empty:
        return [f"No run fell: none is more than {FAR} below the median of its siblings with an interval below theirs."]
    return [*(_sentence(row, table) for _, row in fallen.iterrows()), _common(fallen, table)]


def _siblings(row: pd.Series, table: pd.DataFrame) -> pd.DataFrame:
    same = (table["size"] == row["size"]) & (table["policy"] == row["policy"])
    return table[same & ~table["fallen"]]


def _sentence(row: pd.Series, table: pd.DataFrame) -> str:
    text = (
        f"**{row['policy']} of size {row['size']}, seed {row['seed']} fell**: win rate {row['win_rate']:.3f} "
        f"({row['low']:.3f} to {row['high']:.3f}), median of its {row['siblings']} siblings {row['median']:.3f}."
    )
    others = _siblings(row, table)
    signs = [
        f"{name} {row[name]:.3g} against {others[name].median():.3g}"
        for name in SIGNS
        if row[name] == row[name] and others[name].notna().any()
    ]
    if signs:
        text += f" In the last quarter of PPO: {', '.join(signs)}."
    return text if row["siblings"] > 1 else f"{text} With two seeds, which of them is the usual one is not known."


def _common(fallen: pd.DataFrame, table: pd.DataFrame) -> str:
    shared = []
    for name in SIGNS:
        sides = {_side(row[name], _siblings(row, table)[name].dropna()) for _, row in fallen.iterrows()}
        if len(sides) == 1 and (side := sides.pop()):
            shared.append(f"{side} {name}")
    if fallen[list(SIGNS)].isna().all(axis=None):
        return "What their curves have in common is not known: no curves of PPO belong to them."
    who = "It has" if len(fallen) == 1 else "All that fell have"
    return f"{who} {' and '.join(shared)} than every sibling that did not fall." if shared else (
        "Neither KL, length nor EOS share sets those that fell apart from all their siblings."
    )  # fmt: skip


def _side(value: float, others: pd.Series) -> str:
    if others.empty or value != value or others.min() <= value <= others.max():
        return ""
    return "higher" if value > others.max() else "lower"
