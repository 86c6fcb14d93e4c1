"""Batches of pairs: order, out-of-distribution split, demonstrations for the shift (D07, D08, D13, D18, D21)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.sources import Source

Attach = Callable[..., Any]


@pytest.fixture
def make(attach: Attach, comparisons_file: str, demonstrations_file: str) -> Attach:
    """A PreferenceDataModule over the comparisons, with demonstrations."""

    def make(batch: int = 2, micro: int = 1, trainer: dict[str, Any] | None = None, **settings: Any) -> Any:
        pairs, demonstrations = Source(comparisons_file), Source(demonstrations_file)
        settings = {"validation": pairs, "demonstrations": demonstrations, "eval_batch_size": 2, **settings}
        data = PreferenceDataModule(pairs, batch_size=batch, micro_batch_size=micro, **settings)
        return attach(data, **(trainer or {}))

    return make


def ids_of(rows: Any) -> list[str]:
    return [json.loads(record)["info"]["id"] for record in rows["record"]]


def test_defaults_are_the_papers() -> None:
    data = PreferenceDataModule(Source("x"))
    assert (data.batch_size, data.text.max_query_length, data.text.max_response_length) == (64, 512, 169)


def test_cnndm_pairs_are_a_validation_split_of_their_own(make: Attach) -> None:
    data = make()
    assert ids_of(data.splits["validation"]) == ["t3_a1", "t3_a2", "t3_a3"]
    assert ids_of(data.splits["validation_cnndm"]) == ["c1", "c2"]
    assert len(data.splits["train"]) == 5
    splits = [[batch["split"] for batch in batches] for batches in data.val_dataloader()]
    assert splits == [["validation", "validation"], ["validation_cnndm"]]
    pairs = [[pair for batch in batches for pair in batch["pairs"]] for batches in data.val_dataloader()]
    assert [[pair["batch"] for pair in part] for part in pairs] == [
        ["batch3", "batch5", "batch11"],
        ["cnndm0", "batch0_cnndm"],
    ]
    assert [pair["confidence"] for pair in pairs[0]] == [7, None, 9]
    assert all(pair["split"] == "validation_cnndm" for pair in pairs[1])


def test_a_split_of_one_domain_gives_one_loader(make: Attach, pairs: list[Any], write_jsonl: Attach) -> None:
    news, posts = (Source(write_jsonl(n, part)) for n, part in (("n.jsonl", pairs[3:]), ("p.jsonl", pairs[:3])))
    data = make(validation=posts, test=news)
    assert [[b["split"] for b in each] for each in data.val_dataloader()] == [["validation", "validation"]]
    for batches in (data.test_dataloader(), data.predict_dataloader()):
        assert [[b["split"] for b in each] for each in batches] == [["test_cnndm"]]


def test_test_falls_back_to_validation_and_validation_to_nothing(make: Attach) -> None:
    assert [sum(len(b["pairs"]) for b in batches) for batches in make().test_dataloader()] == [3, 2]
    assert make(validation=None).val_dataloader() == []


def test_chosen_come_first_then_rejected_padded_right(make: Attach, batch_of: Attach, tokenizer: Any) -> None:
    data = make()
    batch = batch_of(data, "train", [1, 0, 4])
    rows = [data.splits["train"][i] for i in (1, 0, 4)]
    expected = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    width = max(len(ids) for ids in expected)
    assert batch["input_ids"].shape == (6, width)
    for ids, got, mask in zip(expected, batch["input_ids"], batch["attention_mask"], strict=True):
        assert got.tolist() == ids + [tokenizer.pad_token_id] * (width - len(ids))
        assert mask.tolist() == [1] * len(ids) + [0] * (width - len(ids))
        assert got[len(ids) - 1] == tokenizer.eos_token_id
    policies = [(pair["chosen_policy"], pair["rejected_policy"]) for pair in batch["pairs"]]
    assert policies == [("sup4_ppo_rm3_kl10", "sup1"), ("sup1", "ref"), ("t5", "lead")]
    assert batch["split"] == "train"


@pytest.mark.parametrize("real", [True, False])
def test_the_pair_mask_says_whether_pairs_count(make: Attach, batch_of: Attach, real: bool) -> None:
    assert batch_of(make(), "train", [0, 1], real)["pair_mask"].tolist() == [real, real]


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 2), (2, 1)])
def test_training_sees_every_pair_once(make: Attach, world: int, micro: int) -> None:
    ranks = [list(make(2, micro, {"rank": r, "world_size": world}).train_dataloader()) for r in range(world)]
    accumulate = 2 // (world * micro)
    assert {len(batches) for batches in ranks} == {3 * accumulate}
    seen = [p["batch"] for batches in ranks for b in batches if b["pair_mask"].all() for p in b["pairs"]]
    assert sorted(seen) == sorted(["batch3", "batch5", "batch11", "cnndm0", "batch0_cnndm"])
    for step in range(3):
        part = [b for batches in ranks for b in batches[step * accumulate : (step + 1) * accumulate]]
        assert {b["share"] for b in part} == {sum(int(b["pair_mask"].sum()) for b in part) / len(part)}


def test_epochs_differ_and_follow_the_trainer(make: Attach) -> None:
    data = make()
    loader = data.train_dataloader()
    orders = []
    for data.trainer.current_epoch in (0, 1, 2):
        orders.append([batch["pairs"][0]["batch"] for batch in loader if batch["pair_mask"].all()])
    assert len({tuple(order) for order in orders}) > 1
    assert len({frozenset(order) for order in orders}) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_demonstrations_for_the_shift_are_all_there_once(
    make: Attach, demos: list[Any], tokenizer: Any, world: int
) -> None:
    texts = []
    for rank in range(world):
        for batch in make(trainer={"rank": rank, "world_size": world}).demonstration_dataloader():
            assert set(batch) == {"input_ids", "attention_mask", "indices"}
            assert (batch["attention_mask"][:, 0] == 1).all()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                assert (ids[~mask] == tokenizer.pad_token_id).all()
                texts.append(tokenizer.decode(ids[mask]))
    assert sorted(t.split("\n\nTL;DR:")[1] for t in texts) == sorted(f" {d['summary']}<|endoftext|>" for d in demos)


def test_without_demonstrations_there_is_no_shift(make: Attach) -> None:
    assert make(demonstrations=None).demonstration_dataloader() is None
