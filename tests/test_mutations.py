"""The mutants of benchmarks/ still fit the code, and the tests that should notice them exist; none of them is run."""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MUTANTS = yaml.safe_load((ROOT / "benchmarks" / "mutants.yaml").read_text())
each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=[m["name"] for m in MUTANTS])


@cache
def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@each_mutant
def test_a_mutant_fits_the_code(mutant: dict[str, Any]) -> None:
    before = (ROOT / mutant["file"]).read_text()
    assert before.count(mutant["old"]) == 1
    after = before.replace(mutant["old"], mutant["new"])
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))


@each_mutant
def test_its_tests_exist(mutant: dict[str, Any]) -> None:
    assert mutant["tests"]
    for test in mutant["tests"]:
        file, _, name = test.partition("::")
        assert (ROOT / file).exists(), test
        assert not name or name in functions_of(ROOT / file), test


def test_every_detail_has_a_mutant_and_every_mutant_a_name() -> None:
    assert {m["detail"] for m in MUTANTS} == {"R", *(f"D{n:02}" for n in range(1, 40))}
    assert len({m["name"] for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (0, "3 passed", ("survived", "")),
        (1, "FAILED tests/a.py::test_b[x] - assert 1 == 2", ("caught", "tests/a.py::test_b")),
        (1, "ERROR tests/a.py::test_b - RuntimeError: nan", ("caught", "tests/a.py::test_b")),
        (
            1,
            "FAILED tests/a.py::test_b - NameError: name 'x' is not defined",
            ("invalid", "tests/a.py::test_b - NameError"),
        ),
        (2, "FAILED tests/a.py::test_b - KeyError: 'x'", ("caught", "tests/a.py::test_b")),  # what xdist returns
        (2, "ERROR tests/a.py - SyntaxError: invalid syntax", ("invalid", "tests/a.py - SyntaxError")),
        (2, "ERROR tests/a.py", ("invalid", "tests/a.py")),
        (4, "ImportError while loading conftest", ("invalid", "ImportError")),
        (1, "Traceback (most recent call last)", ("invalid", "Traceback")),
        (-9, "", ("invalid", "no output")),
    ],
)
def test_only_a_failed_test_counts(
    monkeypatch: pytest.MonkeyPatch, status: int, output: str, verdict: tuple[str, str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = importlib.import_module("mutations").judge(status, output)
    assert found.status == verdict[0]
    assert found.by.startswith(verdict[1])


def test_a_mutant_that_no_longer_fits_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    mutations = importlib.import_module("mutations")
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old, times in (("x = 1", 2), ("y", 0)):
        mutant = mutations.Mutant("one", "D01", "", "a.py", old, "x = 2", ())
        with pytest.raises(mutations.OutdatedError, match=f"one: `old` stands {times} times in a.py"):
            mutant.apply(tmp_path)
