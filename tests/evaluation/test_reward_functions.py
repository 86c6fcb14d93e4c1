"""Functions of the user's own as rewards: how they are called, and what they may return."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf.errors import UserError
from rlhf.evaluation.reward_functions import call_reward_function, check_reward_functions
from rlhf.modules import PPOModule

TEXTS = [{"query": f"q{n}", "response": "x" * n, "record": {"answer": n, "id": f"i{n}"}} for n in (3, 1, 2)]
LENGTHS = [3.0, 1.0, 2.0]
SETTING = "model.reward_function"


def call(function: Any) -> list[float]:
    check_reward_functions(reward_function=function)
    rewards = call_reward_function(function, TEXTS, torch.device("cpu"), SETTING)
    assert rewards.dtype == torch.float32
    return rewards.tolist()


def returning(make: Callable[[list[int]], Any]) -> Callable[..., Any]:
    def my_reward(queries: list[str], responses: list[str], records: list[dict[str, Any]]) -> Any:
        return make([len(response) for response in responses])

    return my_reward


RETURNED: list[Callable[[list[int]], Any]] = [
    list,
    tuple,
    iter,
    np.array,
    torch.tensor,
    pd.Series,
    lambda n: (float(x) for x in n),
    lambda n: np.array(n, dtype=np.float32).reshape(-1, 1),
    lambda n: torch.tensor(n, dtype=torch.bfloat16, requires_grad=False)[:, None],
    lambda n: torch.tensor(n, dtype=torch.float64, requires_grad=True) * 1,
    lambda n: [[x] for x in n],
    lambda n: [torch.tensor(x) for x in n],
    lambda n: [np.array([x]) for x in n],
    lambda n: [Fraction(x) for x in n],
]


@pytest.mark.parametrize("make", RETURNED)
def test_any_row_of_numbers_is_accepted(make: Callable[[list[int]], Any]) -> None:
    assert call(returning(make)) == LENGTHS


def test_truth_values_are_numbers() -> None:
    assert call(returning(lambda n: [x > 1 for x in n])) == [1.0, 0.0, 1.0]
    assert call(returning(lambda n: torch.tensor(n) > 1)) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: [1.0, None, 1.0], r"returned None .* row 2 of 3 \(counting from 1\), whose response is 'x'"),
        (lambda n: [1.0, 1.0, float("nan")], r"returned nan instead of a number for row 3 of 3"),
        (lambda n: np.array([np.inf, 1, 1]), r"returned inf instead of a number for row 1 of 3"),
        (lambda n: [1.0, 1e300, 1.0], r"returned 1e\+300 instead of a number for row 2 of 3"),
        (lambda n: np.array([1, 1j, 1]), r"returned \(1\+0j\) instead of a number for row 1"),
        (lambda n: torch.tensor([1, 1j, 1]), r"returned \(1\+0j\) instead of a number for row 1"),
        (lambda n: [1.0, "2.0", 1.0], r"returned an object of type str .* row 2"),
        (lambda n: np.array(["a", "b", "c"]), r"returned an object of type str_? .* row 1"),
        (lambda n: np.ones((3, 2)), r"returned an object of type ndarray of shape \(2,\) .* row 1"),
        (lambda n: 1.0, "returned 1.0 instead of one number for each of 3 responses"),
        (lambda n: torch.tensor(1.0), r"returned an object of type Tensor of shape \(\) instead of one number"),
        (lambda n: None, "returned None instead of one number"),
        (lambda n: "123", "returned an object of type str instead of one number"),
        (lambda n: {"a": 1, "b": 2, "c": 3}, "returned an object of type dict instead of one number"),
        (lambda n: [1.0, 1.0], "returned 2 rewards for 3 responses"),
        (lambda n: np.ones((1, 3)), "returned 1 rewards for 3 responses"),
    ],
)
def test_anything_else_is_refused_by_function_and_row(make: Callable[[list[int]], Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.reward_function: my_reward {message}"):
        call(returning(make))


def test_a_long_response_is_quoted_by_its_start() -> None:
    texts = [{**TEXTS[0], "response": "ab" * 500}]
    with pytest.raises(UserError, match=r"whose response is 'abab\w{36}\.\.\.'\.$"):
        call_reward_function(returning(lambda n: [None]), texts, torch.device("cpu"), SETTING)


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, queries: list[str], responses: list[str]) -> list[float]:
        return [self.scale * len(response) for response in responses]


def three_by_another_name(queries: list[str], responses: list[str], data: Any = None) -> list[float]:
    return [float(record["answer"]) for record in data]


def two(queries: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def with_a_setting(queries: list[str], responses: list[str], scale: float = 1.0) -> list[float]:
    return [scale * len(response) for response in responses]


def three_with_a_default(queries: list[str], responses: list[str], records: Any = None) -> list[float]:
    return [float(record["answer"]) for record in records]


def anything(*args: Any) -> list[float]:
    return [float(record["answer"]) for record in args[2]]


def trl(completions: list[str], **kwargs: Any) -> list[float]:
    assert set(kwargs) == {"prompts", "answer", "id"}
    return [float(len(completion)) for completion in completions]


def trl_with_a_column(completions: list[str], prompts: list[str], answer: list[int]) -> list[float]:
    assert all(prompt.startswith("q") for prompt in prompts)
    return [float(x) for x in answer]


@pytest.mark.parametrize(
    "function",
    [
        two, with_a_setting, three_with_a_default,
        three_by_another_name, anything, trl, trl_with_a_column, Scaled(1.0),
        functools.partial(with_a_setting, scale=1.0), Scaled(1.0).__call__, lambda q, r: [len(x) for x in r],
    ],
)  # fmt: skip
def test_a_function_may_take_less_or_what_trl_gives(function: Any) -> None:
    assert call(function) == LENGTHS


async def asynchronous(queries: list[str], responses: list[str]) -> list[float]:
    return [0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda responses: [0.0], r"<lambda>\(responses\) must take \(queries, responses, records\)"),
        (lambda a, b, c, d: [0.0], r"<lambda>\(a, b, c, d\) must take"),
        (lambda a, b, *, c: [0.0], "must take"),
        (Scaled, "Scaled is no function"),
        (asynchronous, "asynchronous is asynchronous"),
    ],
)
@pytest.mark.parametrize("setting", ["reward_function", "evaluation_function"])
def test_a_function_that_cannot_be_called_is_refused_before_training(
    model_path: str, function: Any, message: str, setting: str
) -> None:
    settings: dict[str, Any] = {"reward_function": two, setting: function}
    with pytest.raises(UserError, match=rf"^model\.{setting}: .*{message}"):
        PPOModule(model_path, **settings)


def test_a_column_that_the_records_lack_is_named() -> None:
    def my_reward(completions: list[str], label: list[int]) -> list[float]:
        return [0.0 for _ in label]

    with pytest.raises(UserError, match=r"my_reward is missing a required argument: 'label'; .* have answer, id\."):
        call(my_reward)


def fails(queries: list[str], responses: list[str]) -> list[float]:
    return [1.0 / (len(np.array([1])) - 1) for _ in responses]


def fails_late(queries: list[str], responses: list[str]) -> Any:
    return (1.0 / len(response[1:]) for response in responses)


@pytest.mark.parametrize("function", [fails, fails_late])
def test_an_exception_names_function_file_and_line(function: Callable[..., Any]) -> None:
    line = function.__code__.co_firstlineno + 1
    message = rf"{function.__name__} failed in .*test_reward_functions\.py, line {line}: ZeroDivisionError: "
    with pytest.raises(UserError, match=message) as caught:
        call(function)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_inside_a_library_is_placed_in_the_function() -> None:
    def my_reward(queries: list[str], responses: list[str]) -> Any:
        return np.array(responses).reshape(7, 7).tolist()

    with pytest.raises(UserError, match=r"failed in .*test_reward_functions\.py, line \d+: ValueError: cannot reshape"):
        call(my_reward)
