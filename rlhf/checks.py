"""Settings out of range, refused by name."""

from __future__ import annotations

from rlhf.errors import UserError


def at_least(setting: str, value: float, minimum: float) -> None:
    """Refuse a value below a minimum."""
    if value < minimum:
        raise UserError(f"{setting} is {value}; it must be at least {minimum}.")


def above(setting: str, value: float, bound: float) -> None:
    """Refuse a value that is not above a bound."""
    if value <= bound:
        raise UserError(f"{setting} is {value}; it must be greater than {bound}.")


def at_most(setting: str, value: float, maximum: float) -> None:
    """Refuse a value above a maximum."""
    if value > maximum:
        raise UserError(f"{setting} is {value}; it must be at most {maximum}.")
