"""Refuses values that the parser takes and nothing can use, such as null and numbers that a Trainer does not accept."""

import importlib
import inspect
import math
from typing import Any, get_args, get_type_hints

from rlhf.errors import SEEDS, UserError

LARGEST = 2**63 - 1
FOLDERS = ("run_dir", "output")
LOWEST = {  # of arguments of a Trainer
    **dict.fromkeys(("max_epochs", "max_steps", "num_sanity_val_steps"), -1),  # which means all
    **dict.fromkeys(("min_epochs", "min_steps", "limit_val_batches", "limit_test_batches", "limit_predict_batches"), 0),
    **dict.fromkeys(("overfit_batches", "log_every_n_steps", "gradient_clip_val"), 0),
    **dict.fromkeys(("reload_dataloaders_every_n_epochs", "fast_dev_run"), 0),
}
POSITIVE = ("num_nodes", "limit_train_batches", "val_check_interval", "check_val_every_n_epoch")


def check_values(value: Any, name: str = "") -> None:
    """Refuses integers beyond 64 bits, folders without a name, and null for an argument of a class that cannot be null.

    Args:
        value: a config, or a part of it.
        name: how the user names that part.
    """
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{name} is {value}: it should be at most {LARGEST}.")
    if name in FOLDERS and (value == "null" or not str(value).strip()):
        raise UserError(f"{name} is {str(value).strip() or 'empty'}: give it a name.")
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


def check_stage(settings: Any, trains: bool) -> None:
    """Refuses numbers that seed and Trainer of a stage do not accept and, if it `trains`, training without an end."""
    seed, trainer = settings.seed_everything, settings.trainer
    if not isinstance(seed, bool | None) and seed not in SEEDS:
        raise UserError(f"seed_everything is {seed}: it should be from 0 to {SEEDS[-1]}.")
    for name in (*LOWEST, *POSITIVE):
        value, lowest = trainer[name], LOWEST.get(name, 0)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not lowest <= value < math.inf or (value == 0 and name in POSITIVE):
            wanted = f"finite, and {lowest} or more" if name in LOWEST else "above 0"
            raise UserError(f"trainer.{name} is {value}: it should be {wanted}.")
    if trains and trainer.max_epochs in (None, -1) and trainer.max_steps == -1 and trainer.max_time is None:
        raise UserError(
            "trainer.max_epochs: this would train without end; set it, trainer.max_steps or trainer.max_time."
        )
