"""The report of one run or of many over sizes and seeds: one page with tables, figures, claims and samples."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pydantic import NonNegativeInt

from rlhf import files
from rlhf.errors import UserError
from rlhf.report.analysis import analyse, gather
from rlhf.report.lengths import Unit
from rlhf.report.page import Page, markdown
from rlhf.report.runs import Baseline, Run, ordered
from rlhf.report.summary import sample_responses


def report(
    output: str,
    runs: Sequence[Run],
    baselines: Sequence[Baseline] = (),
    lengths: Unit = "tokens",
    samples: NonNegativeInt = 5,
) -> dict[str, pd.DataFrame]:
    """Writes report.md, summary.json, PNG figures and the CSV tables, from judged tables; no model is loaded.

    A report in the same folder is replaced: its tables and figures that the new one does not have are deleted. Returns
    the tables of the report, as returned by `analyse`.

    Args:
        output: the folder to write report.md to; tables and figures go to the folder `report` in it.
        runs: what to report on, one run for each size and seed.
        baselines: results of others, stars in the figure of win rate against size.
        lengths: what lengths are measured in.
        samples: how many sample summaries to show.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from rlhf.report import sections  # which imports seaborn

    check_runs(runs, baselines)
    evidence = gather(runs)
    out = Path(output)
    with files.owned(out / "report.md", "output", beside=True):
        tables = analyse(evidence, lengths)
        page = Page(out, tables)
        page.add("# Report")
        sections.add_findings(page)
        sections.add_summary(page, evidence.rows)
        sections.add_win_rates(page, baselines)
        sections.add_lengths(page, lengths)
        sections.add_reward(page)
        sections.add_seeds(page)
        sections.add_course(page)
        sections.add_rouge(page)
        sections.add_curves(page)
        if samples:
            page.add("## Samples", sample_responses(evidence.rows, samples))
        page.write()
        parts = [name for name in ("findings", "summary", "claims") if name in tables]
        records = {name: json.loads(tables[name].to_json(orient="records")) for name in parts}
        files.write_text(out / files.SUMMARY, json.dumps({"findings": []} | records, indent=2) + "\n")
    summary = tables["summary"].drop(columns=["parameters", "score_std"], errors="ignore")
    constant = [name for name in ("size", "seed") if summary[name].nunique() == 1]
    for text in tables["findings"]["finding"] if "findings" in tables else ():
        print(f"warning: {text}")
    shown = [summary.drop(columns=constant), *([tables["claims"]] if "claims" in tables else [])]
    Console().print(Markdown("\n\n".join(map(markdown, shown))))
    return tables


def check_runs(runs: Sequence[Run], baselines: Sequence[Baseline]) -> list[Run]:
    """Refuses runs that cannot be shown together, before their tables are read; returns them in order."""
    if baselines and any(run.parameters is None for run in runs):
        raise UserError("baselines: they are shown over their number of parameters, so give that of the runs too.")
    return ordered(runs)
