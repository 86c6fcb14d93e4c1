"""Imports run one way, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf

ROOT = Path(rlhf.__file__).parent
# What each room may import from, besides itself. A module that is not listed may import everything.
ALLOWED = {
    "ops": set(),
    "errors": set(),
    "checks": {"errors"},
    "rouge": set(),
    "seeding": set(),
    "heap": set(),
    "devices": set(),
    "run_folder": {"errors"},
    "stage_process": {"heap"},
    "pipeline": {"errors", "run_folder", "stage_process"},
    "generation": {"ops", "devices", "models"},
    "micro_batches": set(),
    "graph_sampling": {"ops", "generation"},
    "rollout": {"ops", "seeding", "micro_batches"},
    "strategies": {"errors"},
    "models": {"ops", "errors"},
    "memory": {"ops", "errors", "models"},
    "workload": {"errors", "memory", "strategies"},
    "data": {"ops", "errors", "checks", "seeding", "rollout", "models", "micro_batches", "workload"},
    "callbacks": {"ops", "errors", "heap", "rollout", "run_folder", "strategies"},
    "modules": {"ops", "errors", "checks", "rouge", "seeding", "generation", "rollout", "models"}
    | {"callbacks", "strategies", "micro_batches", "graph_sampling", "heap", "devices"},
    "evaluation": {"ops", "errors", "checks", "seeding", "rouge", "generation", "models", "data", "callbacks"}
    | {"run_folder", "pipeline"},
}


def imported(file: Path) -> set[str]:
    """Rooms of the package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "rlhf" else {f"rlhf.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("rlhf.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    files = list((ROOT / room).rglob("*.py")) or [ROOT / f"{room}.py"]
    for file in files:
        assert imported(file) - {room} <= ALLOWED[room], file


def test_ops_import_torch_and_nothing_else() -> None:
    for file in (ROOT / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert all(n.split(".")[0] in {"torch", "rlhf", "__future__", "typing", "collections"} for n in names)


@pytest.mark.parametrize("module", ["rlhf", "rlhf.cli.main"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_modules_import_neither_transformers_models_nor_deepspeed() -> None:
    code = (
        "import sys, rlhf.modules; print([m for m in sys.modules if m.startswith(('transformers.models.g', 'deep'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
