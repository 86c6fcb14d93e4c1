"""A causal language model as a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.evaluation.judges import Answers, LocalJudge, Pair, local_model

SHORT = "{query} A:{first} B:{second} Better:"
PAIRS = [
    Pair("Sold my car.", " it is sold", " a car", {}),
    Pair("A long story about work and family.", " b", " some longer text", {}),
    Pair("x", " y", " z", {}),
]


def independent(path: str, question: str, label: str) -> float:
    """Log-probability of a label after a question: one sequence, no padding, plain transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    start, ids = tokenizer(question)["input_ids"], tokenizer(question + label)["input_ids"]
    assert ids[: len(start)] == start
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[i - 1, ids[i]].item() for i in range(len(start), len(ids)))


@pytest.mark.parametrize("labels", [(" A", " B"), (" first one", " second")])
def test_the_more_probable_label_wins(sharp_path: str, tmp_path: Path, labels: tuple[str, str]) -> None:
    judge = LocalJudge(sharp_path, SHORT, labels, batch_size=2)
    judge.prepare(tmp_path / "answers.jsonl")
    answers = judge.prefer(PAIRS)
    for pair, answer in zip(PAIRS, answers, strict=True):
        expected = []
        for texts, names in (((pair.a, pair.b), "ab"), ((pair.b, pair.a), "ba")):
            question = SHORT.format(query=pair.query, first=texts[0], second=texts[1])
            first, second = (independent(sharp_path, question, label) for label in labels)
            expected.append(names[0] if first > second else names[1])
        assert answer == Answers(*expected)


def test_log_probabilities_do_not_depend_on_the_batch_and_are_kept(sharp_path: str, tmp_path: Path) -> None:
    texts = []
    for size in (1, 6):
        judge = LocalJudge(sharp_path, SHORT, batch_size=size)
        judge.prepare(tmp_path / f"{size}.jsonl")
        judge.prefer(PAIRS)
        texts.append([[float(x) for x in judge._answers.of(q.key)[0].text.split()] for q in judge._asked])
        assert judge.usage()["answers_now"] == 6
    # they are kept with four decimals: a number is off by up to 5e-5, a difference of two by up to 1e-4
    torch.testing.assert_close(torch.tensor(texts[0]), torch.tensor(texts[1]), atol=3e-4, rtol=0)
    question = SHORT.format(query=PAIRS[0].query, first=PAIRS[0].a, second=PAIRS[0].b)
    margin = independent(sharp_path, question, " A") - independent(sharp_path, question, " B")
    assert texts[0][0][0] - texts[0][0][1] == pytest.approx(margin, abs=3e-4)
    again = LocalJudge(sharp_path, SHORT)
    again.prepare(tmp_path / "1.jsonl")
    again.prefer(PAIRS)
    assert again.usage()["answers_now"] == 0


def test_a_model_that_can_not_read_so_much(sharp_path: str, reward_path: str, tmp_path: Path) -> None:
    judge = LocalJudge(sharp_path)
    judge.prepare(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match="more than the 64 positions"):
        judge.prefer(PAIRS)
    with pytest.raises(UserError, match="holds a reward model, not a causal language model"):
        LocalJudge(reward_path).prepare(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match=r"answers: the file /proc/nowhere/answers\.jsonl cannot be written"):
        LocalJudge(sharp_path).prepare(Path("/proc/nowhere/answers.jsonl"))


def test_probabilities_that_are_no_numbers_are_no_tie(
    sharp_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = LocalJudge(sharp_path, SHORT)
    judge.prepare(tmp_path / "answers.jsonl")
    monkeypatch.setattr(local_model, "label_logprobs", lambda model, pairs: torch.full((len(pairs), 2), torch.nan))
    with pytest.raises(UserError, match=r"log-probabilities by judge\.model .* are NaN or infinite"):
        judge.prefer(PAIRS)
    assert not (tmp_path / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"template": "x"}, "judge.template"), ({"labels": (" A", " A")}, "judge.labels")],
)
def test_settings_out_of_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LocalJudge("m", **settings)
