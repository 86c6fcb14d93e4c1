"""Rewards by functions of the user's own: how they may be called, and what they may return."""

import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import UserError

RewardFunction = Callable[..., Iterable[float]]
_FORMS = "(queries, responses, records), (queries, responses) or, as TRL calls it, (prompts, completions, **columns)"
_SHOWN = 40  # longest start of a response in a message
_LONGEST = 300  # longest message of another error in one


def name_of(function: RewardFunction) -> str:
    """Returns the name of a function, for messages and curves."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__)


def check_reward_functions(prefix: str = "model.", **functions: RewardFunction | None) -> None:
    """Refuses functions that cannot be called with queries and responses, before anything expensive.

    Args:
        prefix: goes before the names of the settings in messages.
        functions: setting -> function.
    """
    for setting, function in functions.items():
        if function is None:
            continue
        said = f"{prefix}{setting}: {name_of(function)}"
        if inspect.isclass(function) or not callable(function):
            raise UserError(f"{said} is no function; give the import path of one.")
        if inspect.iscoroutinefunction(function):
            raise UserError(f"{said} is asynchronous; give a plain function.")
        try:
            _arguments(function, [], [], [])
        except TypeError:
            raise UserError(f"{said}{inspect.signature(function)} must take {_FORMS}.") from None


def call_reward_function(
    function: RewardFunction, texts: list[dict[str, Any]], device: torch.device, setting: str
) -> Tensor:
    """Computes the rewards of episodes, `(N,)`.

    Args:
        function: returns a number per episode.
        texts: per episode `query`, `response` and `record`.
        setting: how the user names the function, for messages.
    """
    said = f"{setting}: {name_of(function)}"
    queries, responses, records = ([text[name] for text in texts] for name in ("query", "response", "record"))
    try:
        positional, named = _arguments(function, queries, responses, records)
    except TypeError as error:
        raise UserError(f"{said} is {error}; the records have {', '.join(_columns(records))}.") from error
    try:
        result = function(*positional, **named)
        items = _items(result)  # what it yields may fail, too
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST]
        raise UserError(f"{said} failed{_place(function, error)}: {type(error).__name__}: {reason}") from error
    return torch.tensor(
        as_numbers(result if items is None else items, responses, said), dtype=torch.float32, device=device
    )


def as_numbers(result: Any, responses: list[str], said: str) -> list[float]:
    """Returns what code of the user's own returned, one finite number for each response, or refuses it.

    Args:
        said: names the code, for messages.
    """
    values = _items(result)
    if values is None:
        wanted = f"one number for each of {len(responses)} responses"
        raise UserError(f"{said} returned {_described(result)} instead of {wanted}.")
    if len(values) != len(responses):
        raise UserError(f"{said} returned {len(values)} rewards for {len(responses)} responses.")
    numbers = []
    for row, (value, response) in enumerate(zip(values, responses, strict=True)):
        number = _number(value)
        if number is None or not np.isfinite(np.float32(number)):
            shown = response if len(response) <= _SHOWN else f"{response[:_SHOWN]}..."
            raise UserError(
                f"{said} returned {_described(value)} instead of a number for row {row + 1} of {len(responses)} "
                f"(counting from 1), whose response is {shown!r}."
            )
        numbers.append(number)
    return numbers


def _arguments(
    function: RewardFunction, queries: list[str], responses: list[str], records: list[dict[str, Any]]
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the positional and named arguments that a function takes.

    Raises:
        TypeError: it takes none of the forms.
    """
    every = [queries, responses, records]
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return every, {}
    parameters = signature.parameters
    if "completions" in parameters:
        given: dict[str, list[Any]] = {"prompts": queries, "completions": responses}
        others = [name for name in _columns(records) if name not in given]
        given |= {name: [record.get(name) for record in records] for name in others}
        if not records:  # only the form is asked for: any column may come
            given |= {name: [] for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY or p.default is p.empty}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            given = {name: value for name, value in given.items() if name in parameters}
        signature.bind(**given)
        return [], given
    third = list(parameters.values())[2:3]
    default = third[0].default if third else None
    if default is not None and default is not inspect.Parameter.empty and third[0].name != "records":
        every = every[:2]  # a setting of the function's own
    try:
        signature.bind(*every)
    except TypeError:
        every = every[:2]
        signature.bind(*every)
    return every, {}


def _columns(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(records)))


def _items(result: Any) -> list[Any] | None:
    """Returns the items of what a function returned; None if it holds no row of items."""
    if isinstance(result, Tensor):
        result = result.detach().cpu()
        result = (result.double() if result.is_floating_point() else result).numpy()
    if isinstance(result, np.ndarray) and result.ndim == 0:
        return None
    if isinstance(result, str | bytes | Mapping | set) or not isinstance(result, Iterable):
        return None
    return list(result)


def _number(value: Any) -> float | None:
    """Returns a number, or the only one in an array or list; None if it is something else."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value) == 1:
        return _number(value[0])
    try:
        return None if isinstance(value, str | bytes) or np.iscomplexobj(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _described(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | np.number):
        return str(value)
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return f"an object of type {type(value).__name__}{shape}"


def _place(function: RewardFunction, error: Exception) -> str:
    """Tells where a function failed: in the last of its own lines, else of any."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    inner: Any = inspect.unwrap(getattr(function, "func", function))
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    last = (own or frames)[-1:]
    return f" in {last[0].filename}, line {last[0].lineno}" if last else ""
