"""The example in the docs is the example that is tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parent.parent


@pytest.fixture
def words(tmp_path: Path, model_path: str, write_jsonl: object) -> list[str]:
    """PPO without a reward model on a handful of prompts."""
    file = write_jsonl("prompts.jsonl", demonstrations(8, 1, "train"))  # type: ignore[operator]
    return [
        "fit", f"--config={ROOT}/configs/quickstart/ppo.yaml", f"--run_dir={tmp_path}/run",
        f"--model.model_path={model_path}", "--model.reward_path=null", f"--data.train.path={file}",
        f"--data.validation.path={file}", "--data.validation.split=train", "--data.batch_size=8",
        "--data.micro_batch_size=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
    ]  # fmt: skip


def test_a_reward_function_by_name(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    main([*words, "--model.reward_function=examples.short_answers.number_of_words"])
    assert read_curves(tmp_path / "run")["objective/scores"].iloc[0] < 0


def test_a_subclass_with_a_setting_of_its_own(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    main([*words, "--model=examples.short_answers.ShortAnswersPPO", "--model.price=0.2"])
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "price: 0.2" in config
    assert "examples.short_answers.ShortAnswersPPO" in config


def test_the_docs_show_the_example_as_it_is() -> None:
    source = (ROOT / "examples" / "short_answers.py").read_text()
    docs = (ROOT / "docs" / "subclassing.md").read_text()
    shown = re.search(r"class ShortAnswersPPO.*?```", docs, re.DOTALL)
    assert shown is not None
    lines = [line.strip() for line in shown.group().removesuffix("```").splitlines() if line.strip()]
    assert all(line in source for line in lines)
