"""Measures tokens per second of our SFT and reward model and of TRL's SFTTrainer and RewardTrainer, in alternation.

    python benchmarks/stage_throughput.py --stage sft --shape tiny --threads 2                        # any CPU
    python benchmarks/stage_throughput.py --stage sft --shape tiny --threads 2 --loss_on response
    python benchmarks/stage_throughput.py --stage reward --shape tiny --threads 2 --precision bf16-mixed
    python benchmarks/stage_throughput.py --stage sft --shape tiny --threads 2 --trl_batches padding_free
    python benchmarks/stage_throughput.py --stage sft --shape tiny --threads 2 --trl_batches packing

Needs TRL's current release: `pip install rlhf[bench-stages]`, in another environment than `ppo_throughput.py`. Both
sides get the same model with random weights and the same records, as long as TL;DR's; an update is one optimizer step
on all of them. The sides take turns as in `ppo_throughput.py`. It is an error if they see different numbers of real
tokens, or if the loss of any step is not the same.

Prints a table of medians over the updates (peaks: the highest), with the ratio of neighbouring updates, and on the last
line everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from typing import Any

from throughput import results, turns
from throughput.fixtures import prompt_lengths
from throughput.record import Row, StageTask

MODULES = {"ours": "throughput.stage_ours", "trl": "throughput.stage_trl"}
INSTALL = "pip install 'rlhf[bench-stages]'"
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 1e-2}  # of the losses, relative
# `packing` packs before batches are formed: two packs of 1024 tokens are about 8 rows, and a step takes all there are.
BATCHES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1000},
}


def agree(played: list[dict[str, list[Row]]], tolerance: float) -> None:
    """Stops if the sides do not do the same work.

    Args:
        tolerance: of the losses, relative.
    """
    for one in played:
        seen = {side: {row["real"] for row in rows[1:]} for side, rows in one.items()}  # at first we check invariants
        if len(set.union(*seen.values())) > 1:
            sys.exit(f"The sides see different numbers of real tokens per step: {seen}.")
        losses = {side: [row["loss"] for row in rows] for side, rows in one.items()}
        if any(max(step) - min(step) > tolerance * max(step) for step in zip(*losses.values(), strict=True)):
            sys.exit(f"The sides have different losses: {losses}.")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, and draws the table."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"stage": options.stage, "loss_on": options.loss_on, "trl": BATCHES[options.trl_batches]}
        task = turns.task_of(StageTask, options, folder, **more)
        turns.make_fixtures(task, options.shape, "full", prompt_lengths(options.batch))
        played = turns.rounds(task, MODULES, options)
    agree(played, TOLERANCE[task.precision])
    full = {side: list(map(results.complete_stage, rows)) for side, rows in turns.counted(played).items()}
    of = {"sft": f"demonstrations, loss on {task.loss_on}", "reward": "pairs"}[task.stage]
    return results.show(
        f"{options.shape}, {task.stage}", f"{of}, {task.precision}, TRL {options.trl_batches}", full, task
    )


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["sft", "reward"], required=True)
    turns.add_options(parser)
    parser.add_argument("--loss_on", choices=["all", "response"], default="all", help="tokens of SFT's loss")
    parser.add_argument("--trl_batches", choices=BATCHES, default="defaults", help="how SFTTrainer makes its batches")
    options = parser.parse_args()
    turns.check(parser, options, INSTALL)
    if options.stage == "reward" and options.trl_batches != "defaults":
        parser.error(f"--trl_batches {options.trl_batches} is for --stage sft: RewardTrainer only pads.")
    return options


def main() -> None:
    """Measures, and prints."""
    options = parse()
    header = turns.header(options, {"learning_rate": StageTask.learning_rate})
    print(json.dumps({**header, **compare(options)}))


if __name__ == "__main__":
    main()
