"""The report of one run or of many over sizes and seeds: one page with tables, figures, claims and samples."""

# no postponed annotations: jsonargparse would drop the bound of `samples`

from collections.abc import Sequence

import pandas as pd
from pydantic import NonNegativeInt

from rlhf import files
from rlhf.errors import UserError
from rlhf.report import sections
from rlhf.report.analysis import Analysis, analyse, gather
from rlhf.report.lengths import Unit
from rlhf.report.page import Page, presented
from rlhf.report.runs import Baseline, Run


def report(
    output: str,
    runs: Sequence[Run],
    baselines: Sequence[Baseline] = (),
    lengths: Unit = "tokens",
    samples: NonNegativeInt = 5,
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
        UserError: a file or column is missing, tables share no query, or sizes cannot be ordered.
    """
    if baselines and any(run.parameters is None for run in runs):
        raise UserError("baselines: they are shown over their number of parameters, so give that of the runs too.")
    evidence = gather(runs)
    out = files.claim(output, resuming=True, setting="output")
    found = analyse(evidence, lengths)
    page = Page(out)
    page.add("# Report")
    sections.add_summary(page, found)
    sections.add_claims(page, found)
    sections.add_win_rates(page, found, baselines)
    sections.add_lengths(page, found, lengths)
    sections.add_reward(page, found)
    sections.add_seeds(page, found)
    sections.add_course(page, found)
    sections.add_rouge(page, found)
    sections.add_curves(page, found)
    sections.add_samples(page, found, samples)
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
