"""Margins of comparisons as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf.callbacks.export import Export
from rlhf.cli.main import main
from rlhf.data.sources import Source
from rlhf.evaluation.margins import margins
from rlhf.evaluation.reward_scorer import RewardScorer
from rlhf.evaluation.tables import read_table
from rlhf.modules import DPOModule, DPOSettings, Optimization
from rlhf.synthetic.domains import NEWS
from rlhf.synthetic.posts import comparisons


def test_margins_and_clean_labels_of_both_domains(
    reward_path: str, write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [*comparisons(40, 1, "v", 0), *comparisons(4, 1, "v", 0, NEWS, "cnndm")]
    source = Source(write_jsonl("c.jsonl", records))
    words = ["margins", f"--reward={reward_path}", f"--data.path={source.path}", "--batch_size=2"]  # two parts
    main([*words, f"--output={tmp_path}/m.parquet"])
    table = read_table(tmp_path / "m.parquet", "x")
    assert list(table) == ["split", "batch", "confidence", "chosen_policy", "rejected_policy", "margin", "gold_margin"]
    assert table["split"].tolist() == ["posts"] * 40 + ["news"] * 4
    assert (table["gold_margin"] > 0).all()  # labels without noise agree with the gold score
    assert table["margin"].abs().max() > 0
    pd.testing.assert_frame_equal(margins(f"{tmp_path}/n.parquet", reward_path, source, batch_size=2), table)
    monkeypatch.setattr(RewardScorer, "score_ids", None)  # a finished table is kept
    main([*words, f"--output={tmp_path}/m.parquet"])


def test_margin_is_the_difference_of_two_rewards(
    reward_path: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    record = {"prompt": "a b", "chosen": " d", "rejected": " e f g"}
    table = margins(f"{tmp_path}/m.csv", reward_path, Source(write_jsonl("c.jsonl", [record])))
    scorer = RewardScorer(reward_path)
    better, worse = scorer(["a b"], [" d"])[0], scorer(["a b"], [" e f g"])[0]
    assert table["margin"].tolist() == pytest.approx([better - worse], abs=1e-6)
    assert table["confidence"].isna().all()
    assert "gold_margin" not in table


def test_margins_of_a_policy_of_dpo_are_those_of_its_training(
    model_path: str, trainer: Callable[..., Any], preference_data: Callable[..., Any], tmp_path: Path
) -> None:
    module, data = DPOModule(model_path, dpo=DPOSettings(beta=0.3), optimization=Optimization(1e-3)), preference_data()
    trainer(limit_val_batches=0, callbacks=[Export()]).fit(module, data)
    expected = [
        row["reward_chosen"] - row["reward_rejected"]
        for part in trainer().predict(module, data) for batch in part for row in batch
    ]  # fmt: skip
    source, policy = data.sources["validation"], str(tmp_path / "run" / "export")
    words = [f"--reference={model_path}", "--beta=0.3", "--batch_size=5", f"--data.path={source.path}"]
    main(["margins", f"--reward={policy}", f"--output={tmp_path}/m.parquet", *words])
    table = read_table(tmp_path / "m.parquet", "x").sort_values("split", ascending=False)  # posts before news
    assert table["margin"].tolist() == pytest.approx(expected, abs=1e-4)
    assert table["margin"].abs().max() > 1e-3


def test_a_language_model_is_refused(
    model_path: str, comparison_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["margins", f"--reward={model_path}", f"--data.path={comparison_file}", f"--output={tmp_path}/m.csv"])
    assert "not a reward model with one label" in capsys.readouterr().err
