"""The report as a user makes it: from tables on disk, through the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread

from rlhf import run_folder
from rlhf.cli import main
from rlhf.evaluation.report import report
from rlhf.evaluation.runs import Baseline, Run
from rlhf.evaluation.tables import read_table, write_table

WORDS = ["cat", "dog", "mat", "house", "sat", "ran", "saw", "ate", "red", "big", "on", "in", "the", "a"]
SKILL = {("small", "SFT"): 0.30, ("small", "PPO"): 0.55, ("large", "SFT"): 0.42, ("large", "PPO"): 0.75}
SKILL_SIZES = ("small", "large")
PARAMETERS = {"small": 100_000, "large": 800_000}


def judged(path: Path, win: float, seed: int, rows: int = 120, longer: float = 0.0, invalid: int = 0) -> str:
    """A judged table of a policy that wins so often, more so where it is longer."""
    random = np.random.default_rng(seed)
    reference_tokens = np.random.default_rng(0).integers(12, 30, rows)
    tokens = np.maximum(3, (reference_tokens * np.exp(random.normal(longer, 0.3, rows))).round()).astype(int)
    chance = 1 / (1 + np.exp(-(np.log(win / (1 - win)) + 1.5 * (np.log(tokens / reference_tokens) - longer))))
    a_first = np.where(random.random(rows) < chance, "a", "b")
    b_first = np.where(random.random(rows) < 0.85, a_first, "tie").astype(object)
    b_first[:invalid] = "invalid"
    points = {"a": 1.0, "tie": 0.5, "b": 0.0, "invalid": np.nan}
    outcome = [(points[x] + points[y]) / 2 for x, y in zip(a_first, b_first, strict=True)]
    score = random.normal(0, 1, rows) + np.where(a_first == "a", 1.0, -1.0)
    texts = np.random.default_rng(0)
    b = [" ".join(texts.choice(WORDS, size=n)) for n in reference_tokens]
    a = [" ".join([*text.split()[: int(len(text.split()) * win)], *random.choice(WORDS, size=n)]) for text, n in
         zip(b, tokens // 2, strict=True)]  # fmt: skip
    table = pd.DataFrame({
        "id": [f"q{n}" for n in range(rows)], "query": [f"POST: question {n}\nTL;DR:" for n in range(rows)], "a": a,
        "b": b, "a_name": "policy", "b_name": "reference", "judge": "made up", "a_first": a_first, "b_first": b_first,
        "outcome": outcome, "a_tokens": tokens, "b_tokens": reference_tokens, "a_score": score, "b_score": 0.0,
        "a_gold": score + 3, "b_gold": 3.5, "a_has_eos": random.random(rows) < 0.98,
    })  # fmt: skip
    write_table(table, path)
    return str(path)


def margins(path: Path, skill: float, seed: int) -> str:
    """Margins of a reward model of this skill on 160 posts and 80 news."""
    random = np.random.default_rng(seed)
    margin = random.normal(skill, 1, 240)
    write_table(
        pd.DataFrame({
            "split": ["posts"] * 160 + ["news"] * 80,
            "batch": [f"batch{n % 3}" for n in range(160)] + ["cnndm0"] * 80,
            "confidence": [float(n % 4 + 1) for n in range(160)] + [np.nan] * 80,
            "chosen_policy": "x", "rejected_policy": "y", "margin": margin,
            "gold_margin": np.where(random.random(240) < 0.9, 1.0, -1.0),
        }),
        path,
    )  # fmt: skip
    return str(path)


def curves(folder: Path, values: dict[str, Sequence[float]]) -> str:
    """A run folder with curves."""
    logger = TensorBoardLogger(folder, name="", version=run_folder.CURVES)
    for name, points in values.items():
        for step, value in enumerate(points, 1):
            logger.log_metrics({name: value}, 100 * step)
    logger.finalize("success")
    return str(folder)


def ppo_curves(folder: Path, final_kl: float = 9.0, length: float = 24.0) -> str:
    """A run folder of PPO with eight updates."""
    update = np.arange(8)
    return curves(folder, {
        "objective/kl": final_kl * update / 7, "objective/scores": 0.1 * update, "validation/score": 0.12 * update,
        "val/ratio": np.ones(8), "val/ratio_max_deviation": np.full(8, 1e-6), "rollout/eos_share": np.full(8, 0.97),
        "rollout/response_length": np.full(8, length), "validation/gold_scores": 3 + 0.2 * update,
    })  # fmt: skip


def make_run(folder: Path, size: str = "small", seed: int = 1, fallen: bool = False, checkpoints: bool = True) -> Run:
    """A run with everything."""
    number = 10 * seed + len(size)
    random = np.random.default_rng(number)
    skill = {label: SKILL[size, label] + random.normal(0, 0.02) for label in ("SFT", "PPO")}
    if fallen:
        skill["PPO"] = 0.12
    folder = folder / f"{size}-{seed}"
    updates = {n: judged(folder / f"update{n}.parquet", skill["SFT"] + 0.03 * n, number + n) for n in (2, 4, 8)}
    return Run(
        size=size, parameters=PARAMETERS[size], seed=seed,
        policies={
            "SFT": judged(folder / "sft.parquet", skill["SFT"], number),
            "PPO": judged(folder / "ppo.parquet", skill["PPO"], number + 1, longer=0.2, invalid=2),
        },
        margins=margins(folder / "margins.parquet", 0.6 if size == "small" else 1.2, number),
        stages={
            "sft": curves(folder / "sft", {"loss/sft_step": [3, 2, 1.5], "validation/rougeL": [0.2, 0.3]}),
            "reward": curves(folder / "reward", {"loss/reward_step": [0.7, 0.5, 0.4], "validation/accuracy": [0.6, 0.7]}),
            "ppo": ppo_curves(folder / "ppo", 40.0 if fallen else 9.0 + seed, 50.0 if fallen else 24.0),
        },
        checkpoints=updates if checkpoints else {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two sizes with three seeds, of which one collapsed, through the command line."""
    folder = tmp_path_factory.mktemp("study")
    runs = [
        make_run(folder, size, seed, fallen=(size, seed) == ("large", 3)) for size in SKILL_SIZES for seed in (1, 2, 3)
    ]
    words = [f"--runs={json.dumps([asdict(run) for run in runs])}", f"--output={folder}/out"]
    stars = [asdict(Baseline("GPT-x", 400_000, 0.66)), asdict(Baseline("paper", 800_000, 0.7))]
    main(["report", *words, f"--baselines={json.dumps(stars)}", "--samples=2"])
    return folder / "out"
