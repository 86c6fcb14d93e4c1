"""Ablation of one detail: PPO with and without the penalty for the distance from the reference policy (D28).

python -m examples.ablation runs/ablation

The same for the models of the quickstart, over seeds, with a plot (the other ablations are in configs/ablations):

rlhf ablate --config ablations --ablations '[no_kl_penalty]'
"""

import sys
from pathlib import Path

from examples.friendly_words import train
from rlhf.report.curve_files import read_curves


def main(folder: str, updates: int = 12) -> dict[str, float]:
    """Trains twice; returns the KL of the last update of each run, in nats per response."""
    kl = {}
    for name, coefficient in {"default": 0.05, "no_kl_penalty": 0.0}.items():
        train(f"{folder}/{name}", updates, coefficient)
        kl[name] = float(read_curves(Path(folder) / name)["objective/kl"].iloc[-1])
    return kl


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
