"""The quickstart's recipe improves the gold score: its own configs on a tenth of its data, PPO with one seed.

`benchmarks/quickstart.py` runs it whole, in 24 trainings.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.synthesize import Sizes, synthesize

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart"


def fit(stage: str, run: Path, *words: str) -> None:
    """One of the shipped stages, on the data in `run`."""
    demonstrations = [f"--data.{split}.path={run}/data/demonstrations" for split in ("train", "validation")]
    comparisons = [f"--data.{split}.path={run}/data/comparisons" for split in ("train", "validation")]
    data = comparisons if stage == "reward" else demonstrations
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    main(["fit", f"--config={QUICKSTART}/{stage}.yaml", *data, *quiet, *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, an SFT model and a reward model."""
    run = tmp_path_factory.mktemp("quickstart")
    sizes = Sizes(0, train=1_600, validation=64, comparisons=4_000, comparisons_validation=64, comparisons_news=8)
    synthesize(str(run / "data"), seed=1, sizes=sizes)
    fit("sft", run, f"--run_dir={run}/sft", f"--model.model_path={QUICKSTART}/base_model")
    demonstrations = f"--data.demonstrations.path={run}/data/demonstrations"
    fit("reward", run, f"--run_dir={run}/reward", f"--model.model_path={run}/sft/export", demonstrations)
    return run


def test_ppo_improves_the_gold_score(run: Path) -> None:
    """Eight updates of 64 episodes, in the first three of which the critic learns alone."""
    models = [f"--model.model_path={run}/sft/export", f"--model.reward_path={run}/reward/export"]
    small = ["--data.batch_size=64", "--data.rollout_batch_size=64", "--data.micro_batch_size=32"]
    length = ["--trainer.max_epochs=8", "--trainer.check_val_every_n_epoch=8"]
    fit("ppo", run, f"--run_dir={run}/ppo", "--seed_everything=1", *models, *small, *length)
    curves = read_curves(run / "ppo")
    before, after = curves["validation/gold_scores"]
    assert after > before + 0.5
    assert curves["validation/eos"].min() > 0.9
