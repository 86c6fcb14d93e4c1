"""The reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rlhf.callbacks.accuracy_table import AccuracyTable
from rlhf.hardware import accumulator_dtype
from rlhf.models.loading import check_pad_in_embedding, checkpoint_activations, embedding_rows, is_classifier
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules.settings import Optimization
from rlhf.modules.stage_module import StageModule
from rlhf.ops.losses import masked_total, pairwise_losses
from rlhf.ops.masking import masked_mean


class RewardModule(StageModule):
    """Trains a reward model on comparisons.

    Args:
        model_path: the SFT model it starts from (D17); a folder or a hub name.
        centering: weight of `(r_chosen + r_rejected)^2` in the loss (Eisenstein et al. 2023, arXiv 2312.09244), which
            holds rewards of different queries at one level; the pairwise loss alone leaves it open. The paper has none.
        optimization: learning rate, schedule, loss reduction.
        pad_token: token to pad with; by default the tokenizer's own.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    kind = "reward"

    def __init__(
        self,
        model_path: str,
        centering: float = 0.0,
        optimization: Optimization = Optimization(),
        pad_token: str | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(model_path, optimization, pad_token, activation_checkpointing)
        self.centering = centering
        check_pad_in_embedding(self.tokenizer, embedding_rows(self.model_config), model_path)
        self.trained = is_classifier(self.model_config)
        self.centre: Tensor | None = None
        self.model: Any = None

    def configure_model(self) -> None:
        """Load the model, once: a new head on a language model, or a reward model as it is."""
        if self.model is not None:
            return
        setting = "model.model_path"
        if self.trained:
            self.model = ScalarModel.from_pretrained(self.model_path, setting, self.weights_dtype)
        else:
            self.model = ScalarModel.from_policy(self.model_path, self.seed, setting, self.weights_dtype)
        self.model = self.model.to(self.weights_device)
        if self.activation_checkpointing:
            checkpoint_activations(self.model.model)

    # ---------------------------------------------------------------------------------------------------- training

    def scores(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and the rejected responses, `(B,)` each, from one forward (D18).

        Args:
            batch: `input_ids` and `attention_mask`, `(2B, T)`: all chosen, then all rejected.
        """
        chosen, rejected = self.model.score(batch["input_ids"], batch["attention_mask"]).chunk(2)
        return chosen, rejected

    def pair_losses(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Any]) -> Tensor:
        """Loss per pair, `(B,)`. Override this for a margin, label smoothing, or weights."""
        return pairwise_losses(chosen, rejected) + self.centering * (chosen + rejected) ** 2

    def padding_side_difference(self, batch: dict[str, Any]) -> Tensor:
        """Between left- and right-padded sequences of the batch."""
        with self.autocast():
            return self.model.padding_side_difference(batch["input_ids"], batch["attention_mask"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        self.log_learning_rate()
        chosen, rejected = self.scores(batch)
        losses, mask = self.pair_losses(chosen, rejected, batch), batch["pair_mask"].bool()
        pairs = mask.sum()
        correct = ((chosen > rejected) & mask).sum() / pairs.clamp(min=1)
        log: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": int(pairs), "sync_dist": True}
        mean = masked_mean(losses.detach(), mask)
        self.log("loss/reward", mean, **log)
        self.log("train/accuracy", correct, **log)
        self.log("loss/reward_step", mean, prog_bar=True, batch_size=int(pairs))
        return masked_total(losses, mask, self.normaliser(pairs, batch["share"]))

    # -------------------------------------------------------------------------------------------------- evaluation

    def configure_callbacks(self) -> list[Any]:
        """With the table of accuracies per split, batch and confidence (D22)."""
        return super().configure_callbacks() + self.unless_given(AccuracyTable())

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Loss and accuracy of a split; returns `pairs`, a row per pair."""
        return self._evaluate(batch, "validation")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """As validation, on the test split."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A row per pair: rewards, batch, confidence."""
        chosen, rejected = self.scores(batch)
        return [
            {**pair, "reward_chosen": c, "reward_rejected": r}
            for pair, c, r in zip(batch["pairs"], chosen.tolist(), rejected.tolist(), strict=True)
        ]

    def _evaluate(self, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        chosen, rejected = self.scores(batch)
        name = stage + ("_cnndm" if batch["split"].endswith("_cnndm") else "")
        log: dict[str, Any] = {"batch_size": len(chosen), "sync_dist": True, "add_dataloader_idx": False}
        self.log(f"{name}/loss", pairwise_losses(chosen, rejected).mean(), **log)
        self.log(f"{name}/accuracy", (chosen > rejected).float().mean(), prog_bar=True, **log)
        margins = (chosen - rejected).tolist()
        return {"pairs": [{**pair, "margin": m} for pair, m in zip(batch["pairs"], margins, strict=True)]}

    # ------------------------------------------------------------------------------------------------------ export

    def mean_demonstration_reward(self) -> Tensor | None:
        """Mean reward of all demonstrations over all ranks, None where the DataModule has none."""
        scores = self._score_demonstrations(None)
        if scores is None:
            return None
        total, count = self.reduce_sum(torch.stack([scores.sum(), scores.new_tensor(len(scores))]))
        return total / count

    def demonstration_rewards(self) -> Tensor | None:
        """Of the first demonstrations, as the export gives them."""
        if self.centre is None:
            return None
        scores = self._score_demonstrations(256)
        return None if scores is None else scores - self.centre

    @torch.no_grad()
    def _score_demonstrations(self, limit: int | None) -> Tensor | None:
        datamodule = getattr(self.trainer, "datamodule", None)
        batches = datamodule and datamodule.demonstration_dataloader()
        if not batches:
            return None
        scores = [torch.zeros(0, device=self.device)]
        with self.autocast():
            for batch in batches:
                ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
                scores.append(self.model.score(ids, mask))
                if limit is not None and sum(map(len, scores)) >= limit:
                    break
        return torch.cat(scores).to(accumulator_dtype(self.device))

    def prepare_export(self) -> None:
        """Find the shift after which demonstrations have mean 0 (D21)."""
        self.centre = self.mean_demonstration_reward()
        if self.centre is None:
            rank_zero_warn("The reward is not centred: data.demonstrations is not set.")
        else:
            rank_zero_info(
                f"Reward centred: the demonstrations have a mean reward of {self.centre:.4f}, in the export 0."
            )

    def save_export(self, folder: Path) -> None:
        """The reward model and its tokenizer; the shift is in the export only, training goes on without it."""
        self.model.save(folder, self.tokenizer, 0.0 if self.centre is None else self.centre.item())
