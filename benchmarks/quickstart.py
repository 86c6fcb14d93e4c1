"""Runs the quickstart over seeds and roundings: what its reader gets on any machine, as one table.

Another CPU, another number of threads or another kernel rounds other digits, from which a run parts within some steps.
Every run is `python train.py pipeline --config configs/quickstart/pipeline.yaml` with a seed of its own, which is that
of the data too. Finished runs are kept; the same command goes on with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd

from rlhf.report.curve_files import read_curves
from rlhf.report.page import markdown
from rlhf.synthetic.domains import ALL_SLOTS
from rlhf.synthetic.gold_score import gold_score, gold_scores

ROOT = Path(__file__).parent.parent
# name -> environment, and how many runs share the cores
ROUNDINGS: dict[str, tuple[dict[str, str], int]] = {
    "own kernels, two threads": ({"OMP_NUM_THREADS": "2"}, 1),
    "own kernels, one thread": ({"OMP_NUM_THREADS": "1"}, 2),
    "AVX2, one thread": ({"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}, 2),
    "no vectors, one thread": ({"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}, 2),
}
# column -> between what a result that holds lies in every run; and the least of PPO's mean win rate
BOUNDS = {
    "win rate, SFT": (0.20, 0.50), "win rate, PPO": (0.60, 1.0), "gold, PPO - reference": (0.001, 7.0),
    "gain of adapters / gain of PPO": (0.8, 1.5), "agreement": (0.75, 1.0), "EOS, PPO": (0.95, 1.0),
    "highest KL": (0.0, 1e3), "peak GiB": (0.0, 1.2),
}  # fmt: skip
LEAST_MEAN = 0.70


def main() -> None:
    """Runs what is missing, writes the table, and exits with 1 where a bound is not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", default="runs/quickstart_table", help="folder of all runs and of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=list(ROUNDINGS)[:1] + list(ROUNDINGS)[2:])
    words = parser.parse_args()
    out, rows, failed = Path(words.run_dir), [], 0
    for rounding in words.roundings:
        environment, together = ROUNDINGS[rounding]
        folders = [out / rounding.replace(",", "").replace(" ", "-") / f"seed-{seed}" for seed in words.seeds]
        with ThreadPoolExecutor(together) as pool:
            statuses = list(pool.map(partial(run, environment), words.seeds, folders))
        for seed, folder, status in zip(words.seeds, folders, statuses, strict=True):
            failed += status != 0
            if status == 0:
                alone = {"seconds": seconds(folder)} if together == 1 else {}
                rows.append({"rounding": rounding, "seed": seed, **measured(folder), **alone})
        table = pd.DataFrame(rows)
        table.to_csv(out / "quickstart_table.csv", index=False)
        (out / "quickstart_table.md").write_text(page(table))
    print(page(table))
    sys.exit(int(failed > 0 or not holds(table)))


def run(environment: dict[str, str], seed: int, folder: Path) -> int:
    """Runs the quickstart with a seed, and PPO with adapters on its models, or goes on; returns the exit status."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    commands = [["pipeline", "--config", "configs/quickstart/pipeline.yaml", "--seed", str(seed), "--run_dir", folder]]
    adapters, answers, data = folder / "ppo_lora", folder / "generate_ppo_lora.parquet", folder / "data/demonstrations"
    if not (adapters / "export").exists():
        sources = [f"--data.{split}.path={data}" for split in ("train", "validation")]
        models = [f"--model.model_path={folder}/sft/export", f"--model.reward_path={folder}/reward/export"]
        configs = [f"--config=configs/quickstart/{name}.yaml" for name in ("ppo", "lora")]
        commands.append(["fit", *configs, "--run_dir", adapters, f"--seed_everything={seed}", *models, *sources])
    if not answers.exists():
        what = [f"--model={adapters}/export", f"--data.path={data}", "--data.split=validation", "--response_length=40"]
        commands.append(["generate", *what, "--output", answers])
    status = 0
    with (folder / "log").open("a") as log:
        for words in commands:
            command = [sys.executable, "train.py", *map(str, words)]
            environ = os.environ | environment
            status = status or subprocess.run(command, cwd=ROOT, env=environ, stdout=log, stderr=log).returncode
    print(f"ended with status {status}: {folder}", flush=True)
    return status


def seconds(run: Path) -> float:
    """Returns how long the stages of a run took together."""
    return sum(stage.get("seconds", 0) for stage in json.loads((run / "pipeline.json").read_text()).values())


def measured(run: Path) -> dict[str, float]:
    """Reads what came out of a run: the tables of its report, the KL of PPO, and the memory of its largest stage."""
    tables = run / "report"
    summary = pd.read_csv(tables / "summary.csv").set_index("policy")
    accuracy = pd.read_csv(tables / "reward_accuracy_by_split.csv").set_index(["labels", "split"])["accuracy"]
    agreement = pd.read_csv(tables / "reward_agreement.csv").set_index("policy")["agreement"]
    kl = read_curves(run / "ppo")["objective/kl"]
    stages = json.loads((run / "pipeline.json").read_text()).values()
    adapters = gold_of(run / "generate_ppo_lora.parquet")
    before, after = summary["gold"]["SFT"], summary["gold"]["PPO"]
    clean = next(labels for labels in accuracy.index.levels[0] if labels.startswith("clean"))
    return {
        "win rate, SFT": summary.loc["SFT", "win_rate"],
        "win rate, PPO": summary.loc["PPO", "win_rate"],
        "gold, SFT": summary.loc["SFT", "gold"],
        "gold, PPO": summary.loc["PPO", "gold"],
        "gold, reference": summary.loc["reference", "gold"],
        "gold, PPO - reference": summary.loc["PPO", "gold"] - summary.loc["reference", "gold"],
        "gold, PPO with adapters": adapters,
        "gain of adapters / gain of PPO": (adapters - before) / (after - before),
        "reward model, posts": accuracy[clean, "posts"],
        "reward model, news": accuracy[clean, "news"],
        "agreement": agreement["PPO"],
        "facts right, SFT": facts_right(run / "generate_sft.parquet"),
        "facts right, PPO": facts_right(run / "generate_ppo.parquet"),
        "EOS, PPO": summary.loc["PPO", "eos"],
        "highest KL": kl.max(skipna=False),
        "peak GiB": max(stage.get("peak_gib", 0) for stage in stages),
    }


def gold_of(generated: Path) -> float:
    """Computes the mean gold score of responses."""
    table = pd.read_parquet(generated)
    return statistics.mean(
        gold_scores(list(table["query"]), list(table["response"]), [*map(json.loads, table["record"])])
    )


def facts_right(generated: Path) -> float:
    """Computes how many of the facts that responses state are those of the post."""
    table = pd.read_parquet(generated)
    facts = [{k: v for k, v in json.loads(r)["facts"].items() if v is not None} for r in table["record"]]
    found = [gold_score(text, known, ALL_SLOTS) for text, known in zip(table["response"], facts, strict=True)]
    covered, invented = sum(f.covered for f in found), sum(f.invented for f in found)
    return covered / (covered + invented)


def holds(table: pd.DataFrame) -> bool:
    """Tells whether every run and the mean reach their bounds."""
    within = [table[name].between(low, high).all() for name, (low, high) in BOUNDS.items()]
    return all(within) and table["win rate, PPO"].mean() >= LEAST_MEAN


def page(table: pd.DataFrame) -> str:
    """Formats mean and range over all runs, and the table of all runs."""
    numbers = table.drop(columns=["rounding", "seed"])
    ranges = numbers.agg(["mean", "min", "max"]).T.rename_axis("of all runs").reset_index()
    return f"{markdown(ranges)}\n\n{markdown(table)}\n"


if __name__ == "__main__":
    main()
