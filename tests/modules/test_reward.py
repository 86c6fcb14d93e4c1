from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.callbacks.export import Export
from rlhf.errors import UserError
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, RewardModule

Make = Callable[..., Any]
FAST = Optimization(learning_rate=1e-3)


def weights(module: RewardModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def trained(
    model_path: str, trainer: Make, data: Any, optimization: Optimization = FAST, **settings: Any
) -> RewardModule:
    module = RewardModule(model_path, optimization=optimization)
    trainer(limit_val_batches=0, **settings).fit(module, data)
    return module


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_the_result_does_not_depend_on_the_micro_batch_size(
    model_path: str, trainer: Make, preference_data: Make, micro_batch_size: int
) -> None:
    smooth = replace(FAST, eps=1e-3)  # with a small eps the rounding of a tiny gradient would make a large step
    expected = weights(trained(model_path, trainer, preference_data(), smooth))
    actual = weights(trained(model_path, trainer, preference_data(micro_batch_size=micro_batch_size), smooth))
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def test_it_learns_to_tell_pairs_apart(model_path: str, trainer: Make, preference_data: Make) -> None:
    data = preference_data()
    module = trained(model_path, trainer, data, max_epochs=12)
    accuracy = trainer().validate(module, data, verbose=False)[0]["validation/accuracy"]
    assert accuracy >= 0.75  # on the pairs it has seen


def test_centering_holds_rewards_at_one_level(model_path: str, trainer: Make, preference_data: Make) -> None:
    levels = []
    for centering in (0.0, 1.0):
        module = RewardModule(model_path, centering, FAST)
        data = preference_data()
        trainer(limit_val_batches=0, max_epochs=6).fit(module, data)
        rows = [row for part in trainer().predict(module, data) for batch in part for row in batch]
        levels.append(sum((row["reward_chosen"] + row["reward_rejected"]) ** 2 for row in rows))
    assert levels[1] < 0.2 * levels[0]


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_rewards_that_are_no_numbers_are_refused(
    verb: str, reward_path: str, trainer: Make, preference_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScalarModel, "score", lambda self, ids, mask: torch.full((len(ids),), torch.nan))
    with pytest.raises(UserError, match=r"are NaN or infinite: its weights are broken"):
        getattr(trainer(), verb)(RewardModule(reward_path), preference_data())


def test_news_is_a_split_of_its_own(model_path: str, trainer: Make, preference_data: Make) -> None:
    metrics = trainer().validate(RewardModule(model_path, optimization=FAST), preference_data(), verbose=False)
    names = {name for part in metrics for name in part}
    assert {"validation/accuracy", "validation_cnndm/accuracy"} <= names


def test_accuracy_is_over_all_pairs_of_a_split(model_path: str, trainer: Make, preference_data: Make) -> None:
    module, data = RewardModule(model_path, optimization=FAST), preference_data(eval_batch_size=5)
    metrics = trainer().validate(module, data, verbose=False)
    correct = []
    for row in data.splits["validation"]:
        sides = [torch.tensor([row[name]]) for name in ("chosen_ids", "rejected_ids")]
        chosen, rejected = (module.model.score(ids, torch.ones_like(ids)).item() for ids in sides)
        correct.append(chosen > rejected)
    assert metrics[0]["validation/accuracy"] == pytest.approx(sum(correct) / len(correct))


def test_export_is_centred_and_loads_in_plain_transformers(
    model_path: str, trainer: Make, preference_data: Make, tmp_path: Path
) -> None:
    data = preference_data(eval_batch_size=5)  # several batches of demonstrations
    trained(model_path, trainer, data, callbacks=[Export()])
    folder = tmp_path / "run" / "export"
    ours = ScalarModel.from_pretrained(str(folder), "model")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores, shifted = [], []
    for row in data.splits["demonstrations"]:
        ids = torch.tensor([row["input_ids"]])
        scores.append(ours.score(ids, torch.ones_like(ids)).item())
        padded = torch.tensor([row["input_ids"] + [tokenizer.pad_token_id] * 3])
        shifted.append(plain(padded, attention_mask=(padded != tokenizer.pad_token_id).long()).logits.item())
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-5)
    assert [s - plain.config.reward_shift for s in shifted] == pytest.approx(scores, abs=1e-5)
    assert max(scores) - min(scores) > 1e-4


def test_an_export_goes_on_as_it_is(model_path: str, reward_path: str) -> None:
    module = RewardModule(reward_path)
    module.configure_model()
    assert module.model.bias.item() == pytest.approx(0.25)


def test_predict_gives_the_rewards_of_every_pair(model_path: str, trainer: Make, preference_data: Make) -> None:
    batches = trainer().predict(RewardModule(model_path), preference_data())
    rows = [row for loader in batches for batch in loader for row in batch]
    assert len(rows) == 24
    assert {"reward_chosen", "reward_rejected", "batch", "confidence", "split"} <= set(rows[0])


def test_the_shift_is_over_the_demonstrations_of_all_ranks(
    model_path: str, trainer: Make, preference_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = RewardModule(model_path, optimization=FAST), preference_data()
    trainer(limit_val_batches=0).fit(module, data)
    mean = module.mean_demonstration_reward()
    # another process has 96 demonstrations, three times as many, with a mean of 5
    monkeypatch.setattr(module, "reduce_sum", lambda own: own + own.new_tensor([5.0 * 96, 96.0]))
    assert module.mean_demonstration_reward().item() == pytest.approx((mean.item() + 3 * 5) / 4)
