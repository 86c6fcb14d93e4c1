"""The script of docs/your-data.md, as a process of its own; tests/test_docs.py runs its commands."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-data.md").read_text()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone, to write into."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_its_script_needs_no_main_guard(clone: Path) -> None:
    script = re.search(r"```python\n(import rlhf.*?)```", PAGE, re.DOTALL)
    assert script is not None
    (clone / "script.py").write_text(script[1])
    runpy.run_module("examples.own_files", run_name="own_files")["main"]("my")
    file = clone / "my" / "sft.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:96]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "runs/script/sft/export []"
    assert done.stdout.count("Pipeline finished") == 1
