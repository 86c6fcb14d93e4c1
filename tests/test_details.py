"""docs/details.md is true: every detail is there, and every symbol, setting, default and test that it names exists."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
from functools import cache, reduce
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from lightning.pytorch import Trainer

from rlhf.callbacks.findings import INVARIANTS
from rlhf.callbacks.invariants import Invariants
from rlhf.cli.stage import StageCLI
from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.prompts import RolloutDataModule
from rlhf.modules import PPOModule, RewardModule, SFTModule

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "details.md").read_text()
KEYS = ["what", "code", "setting", "test", "while it runs", "the authors' code"]
MISSING = "no such setting"
STAGES: dict[str, dict[str, Any]] = {
    "SFT": {"model": SFTModule, "data": SFTDataModule, "trainer": Trainer},
    "reward model": {"model": RewardModule, "data": PreferenceDataModule, "trainer": Trainer},
    "PPO": {"model": PPOModule, "data": RolloutDataModule, "trainer": Trainer},
}


def fields_of(body: str) -> list[tuple[str, str]]:
    """What an entry says under each of its keys; what stands before the first one is `what`."""
    parts = [part.partition(":**") for part in re.split(r"^- \*\*", f"what:**{body}", flags=re.MULTILINE)]
    return [(key, " ".join(said.split())) for key, _, said in parts]


ENTRIES = [
    (name, fields_of(body))
    for name, body in re.findall(r"^### (\S+) .+?\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
]
each_detail = pytest.mark.parametrize("fields", [dict(fields) for _, fields in ENTRIES], ids=[n for n, _ in ENTRIES])


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@cache
def command_line() -> dict[str, Any]:
    """The defaults that the command line itself brings."""
    with patch.object(StageCLI, "__init__", return_value=None) as made:
        StageCLI.run([])
    return made.call_args.kwargs


def default(stage: str, setting: str) -> Any:
    """The default of a setting as a user types it; MISSING where the stage does not have it."""
    if setting == "seed_everything":
        return command_line()["seed_everything_default"]
    room, name, *path = setting.split(".")
    try:
        value = inspect.signature(STAGES[stage][room].__init__).parameters[name].default
        value = command_line()["trainer_defaults"].get(name, value) if room == "trainer" else value
        return reduce(getattr, path, value)
    except (KeyError, AttributeError):
        return MISSING


@cache
def functions_of(file: str) -> set[str]:
    """Functions of a test file, those of a class as `Class::function`."""
    body = ast.parse((ROOT / file).read_text()).body
    methods = {f"{c.name}::{f.name}" for c in body if isinstance(c, ast.ClassDef) for f in c.body if hasattr(f, "name")}
    return methods | {f.name for f in body if isinstance(f, ast.FunctionDef)}


def test_every_detail_is_there_once_with_all_keys() -> None:
    assert [name for name, _ in ENTRIES] == [f"D{n:02}" for n in range(1, 40)]
    for name, fields in ENTRIES:
        assert [key for key, said in fields if said] == KEYS, name


@each_detail
def test_symbols_stand_where_they_are_said_to(fields: dict[str, str]) -> None:
    assert in_backticks(fields["code"])
    for symbol in in_backticks(fields["code"]):
        found: Any = pydoc.locate(symbol)
        assert found is not None, symbol
        assert symbol.startswith(f"{found.__module__}."), f"{symbol} stands in {found.__module__}"


@each_detail
def test_settings_exist_and_have_these_defaults(fields: dict[str, str]) -> None:
    settings = re.findall(r"`([^`]+)`(?: \(([^)]+)\))?", fields["setting"])
    assert settings or fields["setting"].startswith("none")
    for setting, stages in settings:
        key, value = setting.split(" = ", 1)
        named = stages.split(", ") if stages else [stage for stage in STAGES if default(stage, key) != MISSING]
        assert named, f"no stage has {key}"
        for stage in named:
            assert repr(default(stage, key)) == repr(yaml.safe_load(value)), f"{key} ({stage})"


@each_detail
def test_tests_exist(fields: dict[str, str]) -> None:
    assert in_backticks(fields["test"])
    for node in in_backticks(fields["test"]):
        file, _, name = node.partition("::")
        assert name.rpartition("::")[2].startswith("test_"), node
        assert name in functions_of(file), node


def table_below(heading: str) -> list[list[str]]:
    lines = TEXT.partition(heading)[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_the_invariants_are_all_there_with_their_detail_and_severity() -> None:
    rows = {
        in_backticks(name)[0]: (detail, in_backticks(last)[0])
        for name, detail, _, last in table_below("## What is")[2:]
    }
    assert rows == {name: (known.detail, getattr(Invariants(), name)) for name, known in INVARIANTS.items()}
    for name, fields in ENTRIES:
        watched = dict(fields)["while it runs"]
        for found in re.findall(r"[Ii]nvariants? (?:`(\w+)`)(?:(?:,| and) `(\w+)`)*", watched):
            assert set(filter(None, found)) <= set(INVARIANTS), name
    assert {i.detail for i in INVARIANTS.values()} <= {name for name, _ in ENTRIES}


def test_the_table_of_hyperparameters_has_the_defaults() -> None:
    table = table_below("## Hyper-parameters")
    assert table[0][2:] == list(STAGES)
    for _, setting, *cells in table:
        for key in in_backticks(setting):
            for stage, cell in zip(STAGES, cells, strict=True):
                expected = yaml.safe_load(in_backticks(cell)[0]) if cell else MISSING
                assert repr(default(stage, key)) == repr(expected), f"{key} ({stage})"
