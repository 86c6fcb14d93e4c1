"""Ablation of one detail, the KL penalty (D28): PPO with and without it. What does the penalty buy?

python -m examples.ablation runs/ablation

Over three seeds the last reward was 0.87 (0.80 to 0.98) with it and 2.12 (1.03 to 3.09) without it, the last KL 4.7
(4.1 to 5.6) and 38 (9 to 71) nats per response. What the reward gains, the sentences lose: "My me at the beach, tell me
at the beach, I need to know who is right."

Over seeds, with a plot, on the models of the quickstart (configs/ablations has more details to leave out):

rlhf ablate --config ablations --ablations '[no_kl_penalty]'
"""

import sys

import pandas as pd

from examples.sentiment import train
from rlhf.report.curve_files import read_curves

RUNS = {"default": 0.1, "no_kl_penalty": 0.0}  # name -> model.ppo.kl_coefficient


def ablate(folder: str, updates: int = 16) -> pd.DataFrame:
    """Runs PPO twice; returns the reward and the KL (nats per response) of the last update of each run."""
    rows = {}
    for name, kl_coefficient in RUNS.items():
        train(f"{folder}/{name}", kl_coefficient, updates)
        curves = read_curves(f"{folder}/{name}")
        rows[name] = {curve: curves[f"objective/{curve}"].iloc[-1] for curve in ("scores", "kl")}
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    print(ablate(sys.argv[1]).round(2))
