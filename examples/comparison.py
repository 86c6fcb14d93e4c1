"""Comparison of two runs, here those of examples/ablation.py: one page with their curves, and how each ended.

python -m examples.comparison runs/ablation/default runs/ablation/no_kl_penalty runs/comparison

From the command line:

rlhf report --runs runs/ablation/default runs/ablation/no_kl_penalty --output runs/comparison
"""

import sys

import pandas as pd

from rlhf.report.report import report


def compare(first: str, second: str, output: str) -> pd.DataFrame:
    """Writes report.html and report.md; returns the ends of all curves, a column per run."""
    return report(output, [first, second])["curve_ends"]


if __name__ == "__main__":
    compare(*sys.argv[1:])  # prints the table
    print(f"{sys.argv[3]}/report.html")
