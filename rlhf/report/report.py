"""The report of one run or of many over sizes and seeds: one page with tables, figures, claims and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf import files
from rlhf.checks import at_least, at_most
from rlhf.errors import UserError
from rlhf.report import sections
from rlhf.report.analysis import Analysis, analyse, gather
from rlhf.report.lengths import Unit
from rlhf.report.page import Page, presented
from rlhf.report.runs import Baseline, Run

if TYPE_CHECKING:
    import pandas as pd


def report(
    output: str,
    runs: list[Run],
    baselines: list[Baseline] | None = None,
    lengths: Unit = "tokens",
    samples: int = 5,
) -> Analysis:
    """Writes report.md, PNG figures and the CSV tables behind them, from judged tables; no model is loaded.

    A report in the same folder is replaced: its tables and figures that the new one does not have are deleted.

    Args:
        output: the folder to write report.md to; tables and figures go to the folder `report` in it.
        runs: what to report on, one run for each size and seed.
        baselines: results of others, stars in the figure of win rate against size.
        lengths: what lengths are measured in.
        samples: how many sample summaries to show.

    Returns:
        The tables of the report.

    Raises:
        UserError: a file or column is missing, tables share no query, or sizes can't be ordered.
    """
    at_least("samples", samples, 0)
    if baselines and any(run.parameters is None for run in runs):
        raise UserError("baselines: they stand over their number of parameters, so give that of the runs too.")
    for star in baselines or []:
        at_least(f"baselines: parameters of {star.name}", star.parameters, 1)
        at_least(f"baselines: win_rate of {star.name}", star.win_rate, 0)
        at_most(f"baselines: win_rate of {star.name}", star.win_rate, 1)
    evidence = gather(runs)
    out = files.claim(output, resuming=True, setting="output")
    found = analyse(evidence, lengths)
    page = Page(out)
    page.add("# Report")
    sections.add_summary(page, evidence, found)
    sections.add_claims(page, found)
    sections.add_win_rates(page, found, baselines or [])
    sections.add_lengths(page, found, lengths)
    sections.add_reward(page, found)
    sections.add_seeds(page, found)
    sections.add_course(page, found)
    sections.add_rouge(page, found)
    sections.add_curves(page, evidence)
    sections.add_samples(page, evidence, samples)
    page.write()
    _print(found)
    return found


def _print(found: Analysis) -> None:
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    summary = found.summary.drop(columns=["parameters", "score_std"], errors="ignore")
    constant = [name for name in ("size", "seed") if summary[name].nunique() == 1]
    console.print(_rich(summary.drop(columns=constant), "Summary"))
    if len(found.claims):
        console.print(_rich(found.claims, "Claims"))


def _rich(table: pd.DataFrame, title: str) -> object:
    from rich.table import Table

    heads, rows = presented(table)
    shown = Table(*heads, title=title)
    for row in rows:
        shown.add_row(*row)
    return shown
