"""Holds the policy while the critic learns alone."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rlhf.errors import UserError


class CriticWarmup(Callback):
    """Holds the policy for some updates, then resets the states that AdamW has gathered for it meanwhile.

    At a learning rate of 0, neither weight decay nor rounding moves a weight. The schedule sets the rate again after
    every update. Optimizer states belong to parameters, or under ZeRO to this rank's part of them.

    Args:
        updates: how many.
    """

    def __init__(self, updates: int) -> None:
        self.updates = updates

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer: Any = trainer.optimizers[0]
        if len(optimizer.param_groups) < 2:
            raise UserError(
                "model.ppo.critic_warmup needs an optimizer whose first parameter group is the policy; give yours the "
                "groups of parameter_groups()."
            )
        policy = optimizer.param_groups[0]
        if trainer.current_epoch < self.updates:
            policy["lr"] = 0.0
        elif trainer.current_epoch == self.updates:
            for parameter in policy["params"]:
                for state in optimizer.state.get(parameter, {}).values():
                    state.zero_()  # moments, and the step count that corrects their bias
