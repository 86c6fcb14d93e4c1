"""The examples do what they and the docs say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from test_docs import commands_of, parse, words_of_ours
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from examples import ablation, comparison, sentiment
from rlhf.cli.main import main
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


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


def test_a_sentiment_an_ablation_and_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings that they have; the default of the ablation is the first example."""
    monkeypatch.chdir(ROOT)
    kl = ablation.ablate(str(tmp_path))["kl"]
    assert 0 < 1.2 * kl["default"] < kl["no_kl_penalty"]

    curves = read_curves(tmp_path / "default")
    rewards, before_and_after = curves["objective/scores"].tolist(), curves["validation/score"].tolist()
    assert rewards[0] < -0.5
    assert rewards[-1] > 0.5
    assert before_and_after[0] < 0 < 0.5 < before_and_after[1]

    ends = comparison.compare(*(str(tmp_path / name) for name in ablation.RUNS), str(tmp_path)).set_index("curve")
    assert list(ends) == ["stage", *ablation.RUNS]
    last = read_curves(tmp_path / "no_kl_penalty")["objective/kl"].iloc[-4:]  # a quarter of 16 updates
    assert ends.loc["objective/kl", "no_kl_penalty"] == pytest.approx(last.mean())
    assert "no_kl_penalty" in (tmp_path / "report.html").read_text()


def test_a_classifier_of_transformers_as_reward(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2, **labels).eval()
    classify = pipeline("sentiment-analysis", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
    monkeypatch.setattr(sentiment, "classifier", lambda: classify)
    texts = ["My cat is fine.", "I lost my keys."]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert sentiment.classified_sentiment([], texts) == pytest.approx(logits.softmax(1)[:, 1].tolist(), abs=1e-5)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_commands_of_an_example_exist(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    docs = ast.get_docstring(ast.parse(file.read_text())) or ""
    lines = re.findall(r"^(?:rlhf|python) .*(?:\\\n.*)*", docs, re.MULTILINE)
    for command in (command for line in lines for command in commands_of(line)):
        if (ours := words_of_ours(command)) is None:
            assert command[:3] == ["python", "-m", f"examples.{file.stem}"]
        else:
            parse(ours)


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
