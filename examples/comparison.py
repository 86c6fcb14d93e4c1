"""Comparison of two runs, after examples/ablation.py: one page with their curves and what differs between them.

python -m examples.comparison runs/ablation/default runs/ablation/no_kl_penalty runs/comparison

The same from the command line:

rlhf report --runs runs/ablation/default runs/ablation/no_kl_penalty --output runs/comparison
"""

import sys

import pandas as pd

from rlhf.report.report import report


def main(first: str, second: str, output: str) -> pd.DataFrame:
    """Writes report.html and report.md of two runs; returns the table of the differences to the first one."""
    return report(output, [first, second])["run_differences"]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
