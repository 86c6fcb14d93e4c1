"""docs/your-data.md is run as it stands: its commands, what they print, and its script."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import main

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


def status_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a command in this process."""
    assert words[0] == "python"
    if words[1] == "-m":
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
        return 0
    assert words[1] == "train.py"
    try:
        main(words[2:])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_the_commands_of_the_page(
    clone: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```(\w*)( fails)?\n(.*?)```", PAGE, re.DOTALL)
    printed, ran = "", 0
    for kind, fails, text in blocks:
        if kind == "bash":
            status = status_of(shlex.split(text.replace("\\\n", " ")), monkeypatch)
            printed = "".join(capfd.readouterr())
            assert status == (2 if fails else 0), printed[-3000:]
            ran += 1
        elif not kind:
            for line in text.strip().splitlines():
                assert line.strip() in printed
    assert ran == 4
    run = clone / "runs" / "mine"
    for name in ("sft/export", "reward/export", "ppo/export", "judge_ppo.parquet", "margins.parquet", "report.md"):
        assert (run / name).exists()
    trained = [words for words in commands if words[0] == "fit"]
    assert len(trained) == 3  # nothing was trained before all was right


def test_its_script_needs_no_main_guard(clone: Path) -> None:
    script = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert script is not None
    (clone / "script.py").write_text(script[1])
    runpy.run_module("examples.own_files", run_name="own_files")["main"]("my")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "runs/script/sft/export []"
    assert done.stdout.count("Pipeline finished") == 1
