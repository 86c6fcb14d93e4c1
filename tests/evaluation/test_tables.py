from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf.data.domains import NEWS, REDDIT
from rlhf.data.gold import gold_score
from rlhf.data.records import Source
from rlhf.data.synthetic import comparisons, demonstrations
from rlhf.data.texts import TextFormat
from rlhf.evaluation.tables import add_gold, comparison_margins, generate, has_gold, reward_scores
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar_model import ScalarModel


@pytest.fixture
def reward_path(model_path: str, tmp_path: Path) -> str:
    """A reward model with a random head."""
    ScalarModel.from_policy(model_path, 3).save(tmp_path / "reward", load_tokenizer(model_path))
    return str(tmp_path / "reward")


def test_generate_has_a_row_per_query_whatever_the_batch(model_path: str, write_jsonl: Callable[..., str]) -> None:
    source = Source(write_jsonl("d.jsonl", demonstrations(7, 1, "validation")))
    tables = [generate(model_path, source, response_length=6, temperature=1e-5, batch_size=size) for size in (2, 7)]
    assert tables[0]["response"].tolist() == tables[1]["response"].tolist()
    assert [r["id"] for r in tables[0]["record"]] == [f"validation-1-{n}" for n in range(7)]
    assert has_gold(tables[0])
    gold = add_gold(tables[0])
    for row in gold.itertuples():
        assert row.gold_reference == gold_score(row.reference, row.record["facts"], REDDIT.slots).score


def test_reward_is_read_at_eos_of_the_joint_text(model_path: str, reward_path: str) -> None:
    tokenizer = load_tokenizer(model_path)
    scores = reward_scores(reward_path, ["a b", "c"], [" d", " e f g"], batch_size=2)
    model = ScalarModel.from_pretrained(reward_path, "model")
    for text, score in zip(["a b d", "c e f g"], scores, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        assert model.score(ids, torch.ones_like(ids)).item() == pytest.approx(score, abs=1e-5)


def test_margins_and_clean_labels_of_both_domains(reward_path: str, write_jsonl: Callable[..., str]) -> None:
    records = [*comparisons(6, 1, "v", 0), *comparisons(4, 1, "v", 0, NEWS, "cnndm")]
    table = comparison_margins(reward_path, Source(write_jsonl("c.jsonl", records)), TextFormat())
    assert table["split"].tolist() == ["posts"] * 6 + ["news"] * 4
    assert (table["gold_margin"] > 0).all()  # labels without noise agree with the gold score
    assert table["margin"].abs().max() > 0
