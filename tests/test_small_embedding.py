"""A model whose embedding has no rows for some tokens of its tokenizer is refused where such a token would be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig

from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.evaluation.judges import LocalJudge, Pair
from rlhf.models.scalar_model import ScalarModel

ROWS = 300  # of 500


@pytest.fixture
def small_path(tmp_path: Path, tokenizer: Any, from_config: Callable[..., Any]) -> str:
    """A language model whose PAD, an ordinary token, has a row."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    folder = tmp_path / "small"
    from_config(GPTNeoXConfig(vocab_size=ROWS, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small_reward(small_path: str, tokenizer: Any, tmp_path: Path) -> str:
    ScalarModel.from_policy(small_path, 1).save(tmp_path / "small_reward", tokenizer)
    return str(tmp_path / "small_reward")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(words)
    return capsys.readouterr().err.strip().splitlines()[-1]


SENTENCE = f"has {ROWS} rows; its tokenizer does not fit it"


def test_generate(small_path: str, demonstration_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--model={small_path}", f"--data.path={demonstration_file}", f"--output={tmp_path}/t.parquet"]
    said = refused(["generate", *words], capsys)
    assert said.startswith("error: data holds the token")
    assert SENTENCE in said


def test_margins(small_reward: str, comparison_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--reward={small_reward}", f"--data.path={comparison_file}", f"--output={tmp_path}/t.parquet"]
    assert SENTENCE in refused(["margins", *words], capsys)


def test_a_judge(small_path: str, tmp_path: Path) -> None:
    judge = LocalJudge(small_path)
    judge.prepare(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match=SENTENCE):
        judge.prefer([Pair("a query", "some summary", "another one", {})])


def test_the_reward_model_of_ppo(
    model_path: str, small_reward: str, demonstration_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model=PPOModule", f"--model.model_path={model_path}", f"--model.reward_path={small_reward}"]
    data = ["--data=RolloutDataModule", f"--data.train.path={demonstration_file}", f"--run_dir={tmp_path}/run"]
    said = refused(["fit", *words, *data], capsys)
    assert said.startswith("error: model.reward_path: its vocabulary holds the token")
    assert SENTENCE in said
