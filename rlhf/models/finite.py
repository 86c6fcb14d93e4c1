"""Numbers that models compute are looked at where they are made: NaN would go on as a tie, a zero or a token."""

from typing import Any

from torch import Tensor, nn

from rlhf.errors import UserError

_CAUSE = "its weights are broken, or too large for the precision; take an earlier checkpoint, or float32"


def check_finite(numbers: Tensor, of: str) -> Tensor:
    """Returns the numbers, or refuses them if one is NaN or infinite; waits for a GPU.

    Args:
        of: what they are and which model made them, for the message.
    """
    if bad := int((~numbers.isfinite()).sum()):
        raise UserError(f"{bad} of {numbers.numel()} {of} are NaN or infinite: {_CAUSE}.")
    return numbers


def check_logits(largest: Tensor, model: nn.Module) -> None:
    """Refuses logits if the largest of a row is no number, as one of them is NaN or infinite; waits for a GPU."""
    if not largest.isfinite().all():
        config: Any = model.config
        raise UserError(f"logits of {config.name_or_path} ({type(model).__name__}) are NaN or infinite: {_CAUSE}.")
