"""The report of one run or of many over sizes and seeds: one page with tables, figures, claims and samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from time import sleep, strftime

import pandas as pd
from pydantic import NonNegativeInt

from rlhf import files
from rlhf.errors import UserError
from rlhf.report.analysis import analyse, gather
from rlhf.report.lengths import Unit
from rlhf.report.page import SAMPLES, Page, markdown
from rlhf.report.run_folders import NothingYetError, finished, resolved, signature
from rlhf.report.runs import Baseline, Run, ordered
from rlhf.report.sample_browser import sample_data
from rlhf.report.summary import sample_responses

PRINTED = ("run_differences", "claims")  # below the summary
POLL = 5.0  # seconds between two looks at the files of a run
PATIENCE = 60.0  # seconds for another report into the same folder: a pipeline that is watched writes its own


def report(
    output: str,
    runs: Sequence[str | Run],
    baselines: Sequence[Baseline] = (),
    lengths: Unit = "tokens",
    samples: NonNegativeInt = 5,
    watch: bool = False,
) -> dict[str, pd.DataFrame]:
    """Writes report.html, report.md, summary.json and the CSV tables, from judged tables; no model is loaded.

    A report in the same folder is replaced: its tables and figures that the new one does not have are deleted. Returns
    the tables of the report, as returned by `analyse`.

    Args:
        output: the folder to write report.html and report.md to; tables and figures go to the folder `report` in it.
        runs: what to report on: folders of runs, finished or not, or judged tables; or settings of a run for each size
            and seed. Folders are compared with the first one.
        baselines: results of others, stars in the figure of win rate against size.
        lengths: what lengths are measured in.
        samples: how many sample summaries report.md shows; report.html has all, or none if this is 0.
        watch: make the page anew after each validation and each stage of the folders, until all are finished.
    """
    while watch and not all(map(finished, runs)):
        before = signature(runs)
        try:
            _make(output, resolved(runs), baselines, lengths, samples)
            print(f"{strftime('%H:%M:%S')} {Path(output) / 'report.html'} made; waiting for the next validation")
        except NothingYetError as error:
            print(f"{strftime('%H:%M:%S')} {error} Waiting.")
        while signature(runs) == before:
            sleep(POLL)
    tables = _make(output, resolved(runs), baselines, lengths, samples)
    _show(tables)
    return tables


def _make(
    output: str, runs: Sequence[Run], baselines: Sequence[Baseline], lengths: Unit, samples: int
) -> dict[str, pd.DataFrame]:
    from rlhf.report import sections  # which imports Altair
    from rlhf.report.html_page import render

    check_runs(runs, baselines)
    evidence = gather(runs)
    out = Path(output)
    with files.owned(out / "report.md", "output", PATIENCE, beside=True):
        tables = analyse(evidence, lengths)
        page = Page(out, tables)
        sections.add_findings(page)
        sections.add_progress(page)
        sections.add_comparison(page)
        if "summary" in tables:
            sections.add_summary(page, evidence.rows)
            sections.add_win_rates(page, baselines)
            sections.add_lengths(page, lengths)
            sections.add_reward(page)
        sections.add_seeds(page)
        sections.add_course(page)
        if "summary" in tables:
            sections.add_rouge(page)
        sections.add_curves(page)
        if samples and "summary" in tables:
            page.section(SAMPLES)
            page.add(sample_responses(evidence.rows, samples), short=True)
        page.write(render(page, runs, sample_data(evidence.rows) if samples else None))
        parts = [name for name in ("findings", "summary", "claims") if name in tables]
        records = {name: json.loads(tables[name].to_json(orient="records")) for name in parts}
        files.write_text(out / files.SUMMARY, json.dumps({"findings": []} | records, indent=2) + "\n")
    return tables


def _show(tables: dict[str, pd.DataFrame]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    for text in tables["findings"]["finding"] if "findings" in tables else ():
        print(f"warning: {text}")
    if "summary" in tables:
        summary = tables["summary"].drop(columns=["parameters", "score_std"], errors="ignore")
        constant = [name for name in ("size", "seed") if summary[name].nunique() == 1]
        shown = [summary.drop(columns=constant), *(tables[name] for name in PRINTED if name in tables)]
    else:
        shown = [tables[name] for name in ("progress", "curve_ends") if name in tables]
    Console().print(Markdown("\n\n".join(map(markdown, shown))))


def check_runs(given: Sequence[str | Run], baselines: Sequence[Baseline]) -> list[Run]:
    """Refuses runs that cannot be shown together, before their tables are read; returns them in order."""
    runs = resolved(given)
    if baselines and any(run.parameters is None for run in runs):
        raise UserError("baselines: they are shown over their number of parameters, so give that of the runs too.")
    return ordered(runs)
