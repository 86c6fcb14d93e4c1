from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm
from rlhf.modules import DPOModule, DPOSettings, Optimization

Make = Callable[..., Any]
FAST = Optimization(learning_rate=1e-3)


def test_the_loss_is_log_2_and_the_margins_are_0_before_the_first_step(
    model_path: str, trainer: Make, preference_data: Make
) -> None:
    class First(DPOModule):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            if batch_idx == 0:
                chosen, rejected = self.scores(batch)
                assert torch.equal(chosen, torch.zeros_like(chosen))
                assert torch.equal(rejected, torch.zeros_like(rejected))
                self.first = self.pair_losses(chosen, rejected, batch)
            return super().training_step(batch, batch_idx)

    module = First(model_path, optimization=FAST)
    trainer(limit_val_batches=0).fit(module, preference_data())
    torch.testing.assert_close(module.first, torch.full_like(module.first, math.log(2)))


@pytest.mark.parametrize("normalised", [False, True])
def test_implicit_rewards_are_those_of_a_plain_computation(
    model_path: str, trainer: Make, preference_data: Make, normalised: bool
) -> None:
    module = DPOModule(model_path, dpo=DPOSettings(0.3, length_normalised=normalised), optimization=FAST)
    data = preference_data()
    trainer(limit_val_batches=0).fit(module, data)
    reference = load_causal_lm(model_path).eval()
    predicted = [row for part in trainer().predict(module, data) for batch in part for row in batch]
    pairs = [row for name in ("validation", "validation_cnndm") for row in data.splits[name]]
    assert len(predicted) == len(pairs)
    for row, pair in zip(predicted, pairs, strict=True):
        for side in ("chosen", "rejected"):
            ids, start = torch.tensor([pair[f"{side}_ids"]]), pair[f"{side}_start"]
            both = []
            for model in (module.model.cpu(), reference):
                logits = model(input_ids=ids).logits[0, start - 1 : -1]
                both.append(-F.cross_entropy(logits.float(), ids[0, start:], reduction="none"))
            ratio = both[0] - both[1]
            expected = 0.3 * (ratio.mean() if normalised else ratio.sum())
            assert row[f"reward_{side}"] == pytest.approx(expected.item(), abs=2e-5)


@pytest.mark.parametrize("settings", [DPOSettings(), DPOSettings(label_smoothing=0.1), DPOSettings(loss="ipo")])
def test_it_learns_to_tell_pairs_apart(
    model_path: str, trainer: Make, preference_data: Make, settings: DPOSettings
) -> None:
    data, module = preference_data(), DPOModule(model_path, dpo=settings, optimization=FAST)
    trainer(limit_val_batches=0, max_epochs=12).fit(module, data)
    assert trainer().validate(module, data, verbose=False)[0]["validation/accuracy"] >= 0.75  # on pairs it has seen


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_the_result_does_not_depend_on_the_micro_batch_size(
    model_path: str, trainer: Make, preference_data: Make, micro_batch_size: int
) -> None:
    found = []
    for size in (4, micro_batch_size):
        module = DPOModule(model_path, optimization=replace(FAST, eps=1e-3))
        trainer(limit_val_batches=0).fit(module, preference_data(micro_batch_size=size))
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*found, atol=2e-6, rtol=0)


def test_data_of_another_stage_is_refused(model_path: str, trainer: Make, sft_data: Make) -> None:
    with pytest.raises(UserError, match=r"SFTDataModule is for sft, and DPOModule is for dpo; set --data"):
        trainer().fit(DPOModule(model_path), sft_data())


def test_smoothed_labels_of_ipo_are_refused() -> None:
    with pytest.raises(UserError, match=r"model.dpo.label_smoothing is for the sigmoid loss"):
        DPOSettings(loss="ipo", label_smoothing=0.1)


def test_the_reference_reads_the_data_of_each_fit(
    model_path: str, trainer: Make, preference_data: Make, write_jsonl: Callable[..., str]
) -> None:
    """The table of a fit before is not taken for that of other pairs."""
    other = [{"prompt": "a b", "chosen": f" d {n}", "rejected": f" e f {n}"} for n in range(8)]
    module = DPOModule(model_path, optimization=FAST)
    trainer(limit_val_batches=0).fit(module, preference_data())
    data = PreferenceDataModule(Source(write_jsonl("other.jsonl", other)), batch_size=8, micro_batch_size=4)
    trainer(limit_val_batches=0).fit(module, data)
    found = module.reference_logprobs["train"]
    module.setup("fit")
    assert module.reference_logprobs == {}
    assert len(found) == 8


def test_the_reference_reads_no_more_than_is_used(
    model_path: str, trainer: Make, preference_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = PreferenceDataModule.batches_of

    def batches_of(self: Any, split: str) -> Any:
        for batch in plain(self, split):
            read.append(split)
            yield batch

    monkeypatch.setattr(PreferenceDataModule, "batches_of", batches_of)
    trainer(limit_train_batches=2, limit_val_batches=0).fit(DPOModule(model_path), preference_data())
    assert read == ["train"] * 2


def test_a_reference_of_other_tokens_is_refused(model_path: str, llama_path: str) -> None:
    with pytest.raises(UserError, match=r"model\.reference_path: .* has other tokens than the policy"):
        DPOModule(model_path, reference_path=llama_path)
