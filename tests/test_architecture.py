"""Every arrow points down, names tell files apart, and importing the package is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import rlhf

ROOT = Path(rlhf.__file__).parent
# From the bottom to the top, as docs/design.md draws it: a room imports only from those before it.
ROOMS = [
    "errors", "files", "hardware", "seeding", "heartbeat", "ops", "models", "sampling", "strategies", "protocols",
    "data", "synthetic", "evaluation", "callbacks", "modules", "report", "studies", "cli",
]  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The rooms that a file imports from."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "rlhf" else {f"rlhf.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("rlhf.")}


def test_every_room_is_known() -> None:
    assert {room_of(file) for file in FILES} == {*ROOMS, "__init__", "__main__"}
    assert len(list(ROOT.glob("*.py"))) <= 9


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != ROOT or room_of(f) in ROOMS], ids=lambda f: f.name)
def test_every_arrow_points_down(file: Path) -> None:
    room = room_of(file)
    assert imported(file) <= {room, *ROOMS[: ROOMS.index(room)]}


def test_names_tell_files_apart() -> None:
    names = Counter(file.stem for file in FILES if not file.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []
    for name in names:  # neither "judge" and "judges" nor "check" and "checks"
        assert f"{name}s" not in names, name


def test_files_and_functions_are_short() -> None:
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or (node.end_lineno or 0) - body[0].lineno < 60, (file, node.name)


def test_bounds_reach_the_command_line() -> None:
    # jsonargparse loses pydantic's constraints of postponed annotations; only pydantic's dataclasses keep them.
    for file in FILES:
        text = file.read_text()
        bounded = re.search(r"(pydantic|rlhf.errors) import .*(Positive|Negative|Field|Seed)", text)
        if bounded and "pydantic.dataclasses" not in text:
            assert "from __future__ import annotations" not in text, file


def test_ops_import_torch_and_nothing_else() -> None:
    allowed = {"torch", "jaxtyping", "rlhf", "__future__", "typing", "collections"}
    for file in (ROOT / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert {name.split(".")[0] for name in names} <= allowed, file


@pytest.mark.parametrize("module", ["rlhf", "rlhf.cli.main"])
def test_importing_is_light(module: str) -> None:
    heavy = "('torch', 'transformers', 'deepspeed', 'pandas')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_modules_import_neither_transformers_models_nor_deepspeed() -> None:
    code = (
        "import sys, rlhf.modules; print([m for m in sys.modules if m.startswith(('transformers.models.g', 'deep'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    for name in rlhf.__all__:
        assert getattr(rlhf, name).__name__ == name
        assert name in dir(rlhf)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = rlhf.Nothing
