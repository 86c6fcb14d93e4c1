"""What the two stages that learn from comparisons share."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from rlhf.callbacks.accuracy_table import AccuracyTable
from rlhf.models.finite import check_finite
from rlhf.modules.stage_module import StageModule
from rlhf.ops.losses import masked_total
from rlhf.ops.masking import masked_mean


class PairModule(StageModule):
    """Base of `RewardModule` and `DPOModule`: rewards of both responses of a pair, explicit or implicit."""

    @abstractmethod
    def scores(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Computes the rewards of the chosen and the rejected responses, `(B,)` each, in one forward (D18).

        Args:
            batch: `input_ids`, `attention_mask` and `response_mask`, `(2B, T)`: all chosen, then all rejected.
        """

    @abstractmethod
    def pair_losses(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Any]) -> Tensor:
        """Computes the loss of each pair, `(B,)`. Override this for another loss, or weights."""

    def validation_losses(self, chosen: Tensor, rejected: Tensor, batch: dict[str, Any]) -> Tensor:
        """Computes what is shown as the loss of each pair in validation, `(B,)`."""
        return self.pair_losses(chosen, rejected, batch)

    @override
    @torch.no_grad()
    def row_losses(self, batch: dict[str, Any]) -> Tensor:
        with self.autocast():
            losses = self.pair_losses(*self.scores(batch), batch)
        return losses[batch["pair_mask"].bool()]

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        chosen, rejected = self.scores(batch)
        losses, mask = self.pair_losses(chosen, rejected, batch), batch["pair_mask"].bool()
        self.epoch_means.add(f"loss/{self.kind}", losses, mask)
        measured = {"accuracy": (chosen > rejected).float(), "reward_chosen": chosen, "reward_rejected": rejected}
        for name, values in measured.items():
            self.epoch_means.add(f"train/{name}", values, mask)
        self.log(f"loss/{self.kind}_step", masked_mean(losses.detach(), mask), batch_size=1)
        self.log("lr", torch.tensor(self.learning_rate, device="cpu"), batch_size=1)
        return masked_total(losses, mask, self.normaliser(mask.sum(), batch["share"]))

    @override
    def evaluate(self, batch: dict[str, Any], batch_idx: int, split: str) -> dict[str, list[dict[str, Any]]]:
        chosen, rejected = self.scores(batch)
        name = split + ("_cnndm" if batch["split"].endswith("_cnndm") else "")
        options: dict[str, Any] = {"batch_size": len(chosen), "sync_dist": True, "add_dataloader_idx": False}
        self.log(f"{name}/loss", self.validation_losses(chosen, rejected, batch).mean(), **options)
        self.log(f"{name}/accuracy", (chosen > rejected).float().mean(), prog_bar=True, **options)
        margins = check_finite(chosen - rejected, "margins of pairs").tolist()
        return {"pairs": [{**pair, "margin": m} for pair, m in zip(batch["pairs"], margins, strict=True)]}

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        rewards = (check_finite(rewards, "rewards of pairs").tolist() for rewards in self.scores(batch))
        rows = zip(batch["pairs"], *rewards, strict=True)
        return [{**pair, "reward_chosen": chosen, "reward_rejected": rejected} for pair, chosen, rejected in rows]

    @override
    def default_callbacks(self) -> list[Callback]:
        return [*super().default_callbacks(), AccuracyTable()]
