"""SFT batches: padding, loss mask, weights (D03, D07, D13, D14, D15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig

from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.errors import UserError

Attach = Callable[..., Any]


@pytest.fixture
def make(attach: Attach, demonstrations_file: str) -> Attach:
    """An SFTDataModule over the demonstrations."""

    def make(batch: int = 4, micro: int = 1, trainer: dict[str, Any] | None = None, **settings: Any) -> Any:
        source = Source(demonstrations_file)
        settings = {"validation": source, "eval_batch_size": 2, **settings}
        return attach(SFTDataModule(source, batch_size=batch, micro_batch_size=micro, **settings), **(trainer or {}))

    return make


def test_defaults_are_the_papers() -> None:
    data = SFTDataModule(Source("x"))
    assert (data.batch_size, data.text.max_query_length, data.text.max_response_length) == (128, 512, 53)


def test_sequences_are_padded_right_and_queries_left(make: Attach, batch_of: Attach, tokenizer: Any) -> None:
    data = make()
    batch = batch_of(data, "validation", [0, 2, 1])
    rows = [data.splits["validation"][i] for i in (0, 2, 1)]
    for i, row in enumerate(rows):
        ids, n = row["input_ids"], len(row["input_ids"])
        assert batch["input_ids"][i, :n].tolist() == ids
        assert (batch["input_ids"][i, n:] == tokenizer.pad_token_id).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        pad = batch["queries"].shape[1] - len(row["query_ids"])
        assert batch["queries"][i].tolist() == [tokenizer.pad_token_id] * pad + row["query_ids"]
        assert batch["query_mask"][i].tolist() == [0] * pad + [1] * len(row["query_ids"])
    assert batch["input_ids"].shape[1] == max(len(row["input_ids"]) for row in rows)
    assert batch["queries"].shape[1] == max(len(row["query_ids"]) for row in rows)
    assert batch["query"] == [row["query"] for row in rows]
    assert batch["reference"] == [row["reference"] for row in rows]


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_the_loss_is_on_all_tokens_but_the_first_or_on_the_response(
    make: Attach, batch_of: Attach, loss_on: str
) -> None:
    data = make(trainer={"loss_on": loss_on})
    batch = batch_of(data, "train", [3, 0, 4])
    for row, mask in zip(data.splits["train"].select([3, 0, 4]), batch["loss_mask"].tolist(), strict=True):
        start = row["response_start"] if loss_on == "response" else 1
        n = len(row["input_ids"])
        assert mask == [0] * start + [1] * (n - start) + [0] * (len(mask) - n)


def test_every_token_counts_unless_the_module_says_otherwise(make: Attach, batch_of: Attach) -> None:
    batch = batch_of(make(), "train", [0])
    assert batch["loss_mask"].tolist() == [[0] + [1] * (batch["input_ids"].shape[1] - 1)]


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_a_response_without_query_tokens_leaves_the_first_token_out(
    attach: Attach, batch_of: Attach, tokenizer: Any, write_jsonl: Callable[..., str], loss_on: str
) -> None:
    token = max((t for t in tokenizer.get_vocab() if t.isascii() and t.isalpha()), key=len)
    path = write_jsonl("a.jsonl", [{"prompt": token[:1], "completion": f"{token[1:]} of mine"}])
    data = attach(SFTDataModule(Source(path), batch_size=1, micro_batch_size=1), loss_on=loss_on)
    ids, start = (data.splits["train"][0][c] for c in ("input_ids", "response_start"))
    assert start == 0
    mask = batch_of(data, "train", [0])["loss_mask"]
    assert mask.tolist() == [[0] + [1] * (len(ids) - 1)]
    assert next(iter(data.train_dataloader()))["share"] == mask.sum()


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_a_row_that_is_not_real_counts_for_nothing(make: Attach, batch_of: Attach, loss_on: str) -> None:
    batch = batch_of(make(trainer={"loss_on": loss_on}), "train", [1], False)
    assert batch["loss_mask"].sum() == 0
    assert batch["attention_mask"].sum() > 0


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_the_share_is_the_mean_number_of_counted_tokens(make: Attach, loss_on: str, world: int, micro: int) -> None:
    ranks = []
    for rank in range(world):
        data = make(4, micro, {"rank": rank, "world_size": world, "loss_on": loss_on})
        assert data.trainer.accumulate_grad_batches == 4 // (world * micro)
        ranks.append(list(data.train_dataloader()))
    accumulate = 4 // (world * micro)
    assert {len(batches) for batches in ranks} == {2 * accumulate} == {len(data.train_dataloader())}
    for step in (0, accumulate):
        part = [batch for batches in ranks for batch in batches[step : step + accumulate]]
        tokens = sum(int(batch["loss_mask"].sum()) for batch in part)
        assert {batch["share"] for batch in part} == {tokens / len(part)}
    counted = sum(int(batch["loss_mask"].any(1).sum()) for batches in ranks for batch in batches)
    assert counted == 5


def test_a_training_batch_carries_nothing_to_sample_from(make: Attach) -> None:
    batch = next(iter(make().train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "loss_mask", "share", "rows", "indices"}
    assert all(batch[k].dtype == torch.long for k in ("input_ids", "attention_mask", "loss_mask"))


@pytest.mark.parametrize("world", [1, 2])
def test_validation_and_test_cover_their_split_once_in_order(make: Attach, demos: list[Any], world: int) -> None:
    summaries = [" " + demo["summary"] for demo in demos]
    for rank in range(world):
        data = make(trainer={"rank": rank, "world_size": world})
        for (batches,) in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
            assert [text for batch in batches for text in batch["reference"]] == summaries[rank::world]


def test_the_test_split_goes_before_the_validation_split(make: Attach, demonstrations_file: str) -> None:
    data = make(test=Source(demonstrations_file, limit=1))
    for (batches,), rows in ((data.test_dataloader(), 1), (data.val_dataloader(), 5)):
        assert sum(len(batch["query"]) for batch in batches) == rows


def test_without_validation_there_is_none_and_a_test_needs_a_split(make: Attach) -> None:
    data = make(validation=None)
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match=r"data\.(test|validation)"):
        data.test_dataloader()


def test_epochs_differ_and_follow_the_trainer(make: Attach) -> None:
    data = make()
    loader = data.train_dataloader()
    first = [batch["input_ids"].tolist() for batch in loader]
    data.trainer.current_epoch = 1
    assert [batch["input_ids"].tolist() for batch in loader] != first


def test_accumulation_is_derived_and_a_contradiction_refused(make: Attach) -> None:
    assert make(4, 2, {"accumulate": 2}).trainer.accumulate_grad_batches == 2
    with pytest.raises(UserError, match=r"accumulate_grad_batches is 3, but .* make it 2"):
        make(4, 2, {"accumulate": 3})
    with pytest.raises(UserError, match=r"data\.batch_size 4 does not divide"):
        make(4, 3)


def test_formats_and_lengths_are_settings(make: Attach) -> None:
    data = make(text=TextFormat(query="Post: {post}\nSummary:", max_response_length=4))
    row = data.splits["train"][0]
    assert row["query"].startswith("Post: My flatmate")
    assert len(row["input_ids"]) == row["response_start"] + 4


def test_a_sequence_longer_than_the_positions_of_the_model_is_refused(make: Attach) -> None:
    with pytest.raises(UserError, match="more than the 16 positions of the model"):
        make(trainer={"model_config": GPTNeoXConfig(max_position_embeddings=16)})
