"""Refuses values that the parser takes and nothing can use: null, huge numbers, those that a Trainer cannot have."""

import importlib
import inspect
import math
from typing import Any, get_args, get_type_hints

from rlhf.errors import SEEDS, UserError

LARGEST = 2**63 - 1
FOLDERS = ("run_dir", "output")
UNLIMITED = ("max_epochs", "max_steps", "num_sanity_val_steps")  # of the Trainer: -1 means all
POSITIVE = ("num_nodes", "limit_train_batches", "val_check_interval", "check_val_every_n_epoch")


def check_values(value: Any, name: str = "") -> None:
    """Refuses integers beyond 64 bits, folders without a name, and null for an argument of a class that cannot be null.

    Args:
        value: a config, or a part of it.
        name: how the user names that part.
    """
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{name} is {value}: it should be at most {LARGEST}.")
    if name in FOLDERS and value in ("", "null"):
        raise UserError(f"{name} is {value or 'empty'}: give it a name.")
    for item in value if isinstance(value, list) else ():
        check_values(item, name)
    inner = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    if {"class_path", "init_args"} <= inner.keys() and not isinstance(value, dict):
        nullable, inner = _arguments(import_class(inner["class_path"])), vars(inner["init_args"])
        for key in (key for key, given in inner.items() if given is None and not nullable.get(key, True)):
            raise UserError(f"{name}.{key} is null: give it a value, or leave it out.")
    for key, given in inner.items():
        check_values(given, f"{name}.{key}" if name else key)


def import_class(path: str) -> Any:
    """Returns the class at an import path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _arguments(kind: type) -> dict[str, bool]:
    """Returns the arguments of a class, also of those that it hands arguments on to, and whether they can be None."""
    found: dict[str, bool] = {}
    for base in kind.__mro__:
        made = vars(base).get("__init__")
        try:
            hints = get_type_hints(made) if inspect.isfunction(made) else {}
        except NameError:  # of types that only a type checker imports, such as those of Lightning's loggers
            continue
        for key, hint in hints.items():
            found.setdefault(key, hint is Any or type(None) in (hint, *get_args(hint)))
    return found


def check_stage(settings: Any) -> None:
    """Refuses numbers that seed and Trainer of a stage cannot have, and training without an end."""
    seed, trainer = settings.seed_everything, settings.trainer
    if not isinstance(seed, bool | None) and seed not in SEEDS:
        raise UserError(f"seed_everything is {seed}: it should be from 0 to {SEEDS[-1]}.")
    times = trainer.max_time.items() if isinstance(trainer.max_time, dict) else ()
    for name, value in [*trainer.items(), *((f"max_time.{unit}", number) for unit, number in times)]:
        lowest = -1 if name in UNLIMITED else 0
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not lowest <= value < math.inf or (value == 0 and name in POSITIVE):
            wanted = "above 0" if name in POSITIVE else f"finite, and {lowest} or more"
            raise UserError(f"trainer.{name} is {value}: it should be {wanted}.")
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1 and trainer.max_time is None:
        raise UserError(
            "trainer.max_epochs: this would train without end; set it, trainer.max_steps or trainer.max_time."
        )
