"""The summary of runs: a row per policy and one for the reference, what PPO gained, and the seeds side by side."""

import pandas as pd

from rlhf.evaluation.statistics import KEYS, win_rates
from rlhf.report.curve_files import last_quarter
from rlhf.report.runs import PPO, RUN, SFT, per_group, reference_name

FINAL_MEANS = {"objective/kl": "KL", "rollout/response_length": "length", "rollout/eos_share": "EOS share"}


def summarise(rows: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Makes a row for each policy of each run, and one for its reference, of judged rows and their `rouge_rows`.

    A column that no table has is left out.
    """
    more = {"rougeL": ("rougeL", "mean"), "eos": ("a_has_eos", "mean"), "kl": ("a_kl", "mean")}
    policies = _means(rows.assign(rougeL=scores["rougeL"]), "a", **more)
    first = rows[rows["policy"] == rows.groupby(["size", "seed"])["policy"].transform("first")]
    table = policies.merge(win_rates(rows)[[*KEYS, "win_rate", "low", "high"]], on=KEYS)
    table = pd.concat([table, _means(first.assign(policy=reference_name(rows)), "b")], ignore_index=True)
    order = table.groupby(RUN, sort=False).ngroup()
    table = table.loc[order.to_numpy().argsort(kind="stable")].reset_index(drop=True)
    columns = ["score", "score_std", "gold", "kl", "win_rate", "low", "high", "rougeL", "eos", "length"]
    return table[[*KEYS, *columns]].dropna(axis=1, how="all")


def _means(rows: pd.DataFrame, side: str, **more: tuple[str, str]) -> pd.DataFrame:
    means = {"score": (f"{side}_score", "mean"), "gold": (f"{side}_gold", "mean"), "length": (f"{side}_tokens", "mean")}
    return rows.groupby(KEYS, sort=False).agg(**means, **more, score_std=(f"{side}_score", "std")).reset_index()


def ppo_gains(rows: pd.DataFrame) -> list[str]:
    """Says how far PPO moved the mean score, in standard deviations of the SFT scores: a sentence per run."""
    said = []
    runs = rows.groupby(["size", "seed"], sort=False)
    for (size, seed), run in runs:
        before, after = run[run["policy"] == SFT], run[run["policy"] == PPO]
        gain = (after["a_score"].mean() - before["a_score"].mean()) / (before["a_score"].std() or float("nan"))
        gold = after["a_gold"].mean() - before["a_gold"].mean()
        if pd.notna(gain):  # there are scores, and those of SFT are not all equal
            name = f"Size {size}, seed {seed}: " if len(runs) > 1 else ""
            text = f"{name}PPO moved the mean score by {gain:+.2f} standard deviations of the SFT scores"
            gold_gain = f", and the gold score by {gold:+.2f}" if pd.notna(gold) else ""
            said.append(f"{text}{gold_gain}, on {len(after)} queries.")
    return said


def side_by_side(rates: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Puts win rates beside the mean KL, length and EOS share of PPO's last quarter, NaN where there is no curve."""
    own = curves[curves["stage"] == "ppo"]
    last = last_quarter(own, ["size", "seed", "curve"])
    finals = last.pivot_table("value", ["size", "seed"], "curve").reindex(columns=list(FINAL_MEANS))
    finals = finals.rename(columns=FINAL_MEANS).reset_index().assign(policy=PPO)
    return rates[[*KEYS, "win_rate", "low", "high"]].merge(finals, "left", ["size", "seed", "policy"])


def invariants(curves: pd.DataFrame) -> pd.DataFrame:
    """Lists what must hold in PPO and what PPO costs, a row per run, from the curves that there are."""

    def compute(part: pd.DataFrame) -> dict[str, float]:
        points = {name: own["value"] for name, own in part.groupby("curve")}
        row = {}
        if "val/ratio_max_deviation" in points:
            row["largest |ratio - 1| before the first step"] = points["val/ratio_max_deviation"].max()
        if "objective/kl" in points:
            kl = points["objective/kl"]
            row |= {"first KL": kl.iloc[0], "last KL": kl.iloc[-1], "highest KL": kl.max()}
        if "rollout/eos_share" in points:
            row["EOS share in the last update"] = points["rollout/eos_share"].iloc[-1]
        return row

    return per_group(curves[curves["stage"] == "ppo"], ["size", "seed"], compute)


def sample_responses(rows: pd.DataFrame, count: int) -> str:
    """Formats the first queries with the responses of each size's policies, from its smallest seed, as Markdown."""
    shown = rows[rows["seed"] == rows.groupby("size")["seed"].transform("min")]
    several = shown["size"].nunique() > 1
    blocks = []
    for query, part in list(shown.groupby("query", sort=False))[:count]:
        lines = []
        for row in part.itertuples():
            name = f"{row.policy} {row.size}" if several else row.policy
            score = "" if pd.isna(row.a_score) else f" ({row.a_score:.2f})"
            lines.append(f"- **{name}**{score}: {_item(row.a)}")
        quoted = "> " + "\n> ".join(query.strip().splitlines())
        blocks.append("\n".join([quoted, "", *lines, f"- **{reference_name(rows)}**: {_item(part['b'].iloc[0])}"]))
    return "\n\n".join(blocks)


def _item(text: str) -> str:
    return "\n  ".join(text.strip().splitlines())  # indented lines stay in the item of a list
