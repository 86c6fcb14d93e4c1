from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torchmetrics.functional.text import rouge_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.callbacks.export import Export
from rlhf.errors import UserError
from rlhf.files import is_complete
from rlhf.modules import Optimization, SFTModule

FAST = Optimization(learning_rate=1e-3)
Make = Callable[..., Any]


def weights(module: SFTModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def trained(model_path: str, trainer: Make, data: Any, module: SFTModule | None = None, **settings: Any) -> SFTModule:
    module = module or SFTModule(model_path, optimization=FAST, response_length=5)
    trainer(limit_val_batches=0, **settings).fit(module, data)
    return module


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_the_result_does_not_depend_on_the_micro_batch_size(
    model_path: str, trainer: Make, sft_data: Make, micro_batch_size: int
) -> None:
    expected = weights(trained(model_path, trainer, sft_data()))
    actual = weights(trained(model_path, trainer, sft_data(micro_batch_size=micro_batch_size)))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_means_of_micro_batches_do_depend_on_it(model_path: str, trainer: Make, sft_data: Make) -> None:
    results = []
    for size in (1, 8):
        module = SFTModule(model_path, optimization=Optimization(1e-3, loss_reduction="microbatch"))
        results.append(weights(trained(model_path, trainer, sft_data(micro_batch_size=size), module)))
    assert (results[0] - results[1]).abs().max() > 1e-4


def test_loss_is_the_mean_over_real_tokens(model_path: str, trainer: Make, sft_data: Make) -> None:
    module, data = SFTModule(model_path, response_length=5), sft_data()
    metrics = trainer().validate(module, data, verbose=False)[0]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    total, tokens = 0.0, 0
    for row in data.splits["validation"]:
        ids = torch.tensor([row["input_ids"]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert metrics["validation/loss"] == pytest.approx(total / tokens, abs=1e-4)


def test_response_only_loss_ignores_the_query(model_path: str, trainer: Make, sft_data: Make) -> None:
    module, data = SFTModule(model_path, loss_on="response", response_length=5), sft_data()
    metrics = trainer().validate(module, data, verbose=False)[0]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    total, tokens = 0.0, 0
    for row in data.splits["validation"]:
        ids = torch.tensor([row["input_ids"]])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[row["response_start"] - 1 :]
        total, tokens = total - chosen.sum().item(), tokens + len(chosen)
    assert metrics["validation/loss"] == pytest.approx(total / tokens, abs=1e-4)


def test_rouge_is_over_the_whole_split(model_path: str, trainer: Make, sft_data: Make) -> None:
    module, data = SFTModule(model_path, response_length=8), sft_data(eval_batch_size=5)
    texts: list[tuple[str, str]] = []

    def respond(batch: dict[str, Any], batch_idx: int) -> tuple[list[str], list[bool]]:
        """Is good at the last batch, which is smaller, and has a word or two right in the others."""
        references = batch["reference"]
        responses = references if len(references) < 5 else [text[: len(text) // 2] for text in references]
        texts.extend(zip(responses, references, strict=True))
        return responses, [True] * len(responses)

    module.respond = respond  # type: ignore[method-assign]
    metrics = trainer().validate(module, data, verbose=False)[0]
    predictions, references = zip(*[(r.strip(), t.strip()) for r, t in texts], strict=True)
    expected = rouge_score(list(predictions), list(references), rouge_keys="rougeL")["rougeL_fmeasure"]
    assert len(texts) == 32
    assert metrics["validation/rougeL"] == pytest.approx(float(expected), abs=1e-6)


class Stop(Exception):  # noqa: N818
    pass


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            raise Stop


def test_a_run_that_stops_in_mid_epoch_resumes_exactly(
    model_path: str, trainer: Make, sft_data: Make, tmp_path: Path
) -> None:
    expected = weights(trained(model_path, trainer, sft_data(), max_epochs=2))
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3)
    settings = {"max_epochs": 2, "callbacks": [checkpoint, StopAfter(4)], "enable_checkpointing": True}
    with pytest.raises(Stop):
        trained(model_path, trainer, sft_data(), **settings)
    module = SFTModule(model_path, optimization=FAST)
    trainer(limit_val_batches=0, max_epochs=2).fit(module, sft_data(), ckpt_path=checkpoint.best_model_path)
    assert torch.equal(weights(module), expected)


def test_cosine_goes_from_the_learning_rate_to_zero(model_path: str, trainer: Make, sft_data: Make) -> None:
    rates: list[float] = []

    class Rates(SFTModule):
        def on_train_batch_end(self, *args: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    trained(model_path, trainer, sft_data(micro_batch_size=8), Rates(model_path, optimization=FAST))
    assert rates == pytest.approx(
        [1e-3 * 0.5 * (1 + torch.cos(torch.tensor(k / 4 * torch.pi)).item()) for k in (1, 2, 3, 4)]
    )


def test_export_loads_in_plain_transformers(model_path: str, trainer: Make, sft_data: Make, tmp_path: Path) -> None:
    module = trained(model_path, trainer, sft_data(), callbacks=[Export()])
    folder = tmp_path / "run" / "export"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert is_complete(folder)
    assert tokenizer.pad_token == "[PAD]"
    assert plain.config.pad_token_id == tokenizer.pad_token_id
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(plain(ids).logits, module.model(ids).logits)


def test_resize_embeddings_makes_room_for_pad(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=tokenizer.pad_token_id, n_embd=16, n_layer=1, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="resize_embeddings"):
        SFTModule(str(folder))
    module = SFTModule(str(folder), resize_embeddings=True)
    module.configure_model()
    assert module.model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_dropout_is_off_in_training(tmp_path: Path, trainer: Make, sft_data: Make, tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, attn_pdrop=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    module = trained(str(folder), trainer, sft_data())
    module.train()
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(module.model(ids).logits, module.model(ids).logits)


def test_predict_gives_a_response_per_query(model_path: str, trainer: Make, sft_data: Make) -> None:
    t: Trainer = trainer()
    rows = [row for batch in t.predict(SFTModule(model_path, response_length=4), sft_data()) or [] for row in batch]
    assert len(rows) == 32
    assert set(rows[0]) == {"query", "response", "reference", "has_eos"}


class OnRank(SFTModule):
    """Thinks that it is some process of several."""

    rank = 0

    @property
    def global_rank(self) -> int:
        return self.rank


def test_every_batch_and_every_rank_samples_by_a_seed_of_its_own(
    model_path: str, trainer: Make, sft_data: Make
) -> None:
    data, module = sft_data(), OnRank(model_path, response_length=8, temperature=1.0)
    trained(model_path, trainer, data, module)
    batch = next(iter(data.val_dataloader()[0]))

    def responses(index: int, rank: int) -> list[str]:
        module.rank = rank
        return [row["response"] for row in module.predict_step(batch, index)]

    first = responses(0, 0)
    assert first == responses(0, 0)
    assert len({*first, *responses(1, 0), *responses(0, 1), *responses(1, 1)}) == 4 * len(first)
