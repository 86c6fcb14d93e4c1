"""Numbers for responses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.evaluation.judges import Pair, RewardJudge
from rlhf.evaluation.margins import margins
from rlhf.evaluation.reward_scorer import RewardScorer, gold_columns
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.synthetic.domains import REDDIT
from rlhf.synthetic.gold_score import gold_score
from rlhf.synthetic.posts import demonstrations


def test_reward_is_read_at_eos_of_the_joint_text(model_path: str, reward_path: str) -> None:
    tokenizer = load_tokenizer(model_path)
    scores = RewardScorer(reward_path, batch_size=2)(["a b", "c", "d"], [" d", " e f g", ""])
    model = ScalarModel.from_pretrained(reward_path, "model")
    for text, score in zip(["a b d", "c e f g", "d"], scores, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        assert model.score(ids, torch.ones_like(ids)).item() == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("control", [False, True])
def test_special_tokens_in_texts_are_text_unless_control_ids(model_path: str, reward_path: str, control: bool) -> None:
    tokenizer = load_tokenizer(model_path)
    score = RewardScorer(reward_path, control=control)(["a<|endoftext|>b"], [" c"])[0]
    ids = tokenizer("a<|endoftext|>b c", split_special_tokens=not control)["input_ids"]
    assert (tokenizer.eos_token_id in ids) is control
    joint = torch.tensor([[*ids, tokenizer.eos_token_id]])
    model = ScalarModel.from_pretrained(reward_path, "model")
    assert model.score(joint, torch.ones_like(joint)).item() == pytest.approx(score, abs=1e-5)


def test_gold_scores_only_where_all_records_have_facts() -> None:
    records = list(demonstrations(3, 1, "v"))
    texts = [record["summary"] for record in records]
    table = pd.DataFrame({"query": texts, "text": texts, "empty": "", "record": [json.dumps(r) for r in records]})
    columns = gold_columns(table, gold="text", nothing="empty")
    assert columns["gold"] == [gold_score(r["summary"], r["facts"], REDDIT.slots).score for r in records]
    assert columns["nothing"] == [0, 0, 0]
    table.loc[2, "record"] = '{"id": 3}'
    assert gold_columns(table, gold="text") == {}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_rewards_that_are_no_numbers_are_refused_wherever_they_would_go(
    reward_path: str, wrong: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, comparison_file: str
) -> None:
    """As a tie of a judge, and as a margin."""
    monkeypatch.setattr(ScalarModel, "read", lambda self, hidden: torch.full(hidden.shape[:-1], wrong))
    pair = Pair("q", " a", " b", {})
    judge = RewardJudge(reward_path)
    judge.prepare(tmp_path / "none")
    with pytest.raises(UserError, match=r"1 of 1 rewards by judge\.model .* are NaN or infinite"):
        judge.prefer([pair])
    with pytest.raises(UserError, match=r"rewards by reward .* are NaN or infinite"):
        margins(f"{tmp_path}/m.csv", reward_path, Source(comparison_file))


def test_a_conversation_is_read_in_the_words_of_the_chat_template(reward_path: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(reward_path)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    model = ScalarModel.from_pretrained(reward_path, "model")
    model.save(tmp_path / "chat", tokenizer)
    record = {"prompt": [{"role": "user", "content": "hello"}]}
    scores = RewardScorer(str(tmp_path / "chat"))(["User: hello\n\nAssistant:"], ["hi"], [record])
    ids = torch.tensor([[*tokenizer("[user]hello[assistant]hi")["input_ids"], tokenizer.eos_token_id]])
    assert scores == pytest.approx([model.score(ids, torch.ones_like(ids)).item()], abs=1e-5)
