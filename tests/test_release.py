"""The archives of a release hold everything, and run in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import rlhf

ROOT = Path(rlhf.__file__).parent.parent
SOURCES = ("rlhf", "configs", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "train.py")
BUILD = "from setuptools import build_meta; build_meta.build_{0}('..')"


def run(words: list[object], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, words)], cwd=folder, env=os.environ | environment, text=True, capture_output=True, timeout=300
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and the wheel that is built from it, without network."""
    out = tmp_path_factory.mktemp("release")
    clone = out / "clone"
    clone.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    run([sys.executable, "-c", BUILD.format("sdist")], clone)
    (sdist,) = out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, out)
    run([sys.executable, "-c", BUILD.format("wheel")], out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_the_archives_hold_all_files_of_the_package(archives: tuple[Path, Path]) -> None:
    sdist, wheel = archives
    with tarfile.open(sdist) as file:
        in_sdist = {name.partition("/")[2] for name in file.getnames()}
    in_wheel = {*zipfile.ZipFile(wheel).namelist()}
    files = {path for path in (ROOT / "rlhf").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files |= {ROOT / "rlhf" / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.*") if path.is_file()}
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"rlhf/py.typed", "rlhf/configs/quickstart/base_model/model.safetensors"} <= wanted
    assert wanted <= in_wheel
    assert wanted <= in_sdist
    assert not [name for name in in_wheel if not name.startswith(("rlhf/", f"rlhf-{rlhf.__version__}.dist-info/"))]


def test_the_wheel_runs_in_an_empty_folder(archives: tuple[Path, Path], tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", installed, archives[1]], empty)
    environment = {"PYTHONPATH": str(installed)}
    where = run([sys.executable, "-c", "import rlhf; print(rlhf.__file__)"], empty, **environment)
    assert where.strip() == str(installed / "rlhf" / "__init__.py")
    words = [installed / "bin" / "rlhf", "pipeline", "--config", "quickstart"]
    said = run([*words, "--ppo.model.wrong", "1"], empty, **environment)
    # All stages are looked at, with the base model and the configs of the package: this is all that is wrong.
    assert said.endswith("nothing was started:\n  ppo: model: rlhf.PPOModule: Option 'wrong' is not accepted.\n"), said
    assert {path.name for path in empty.iterdir()} <= {"runs"}


def test_the_version_is_in_the_changelog_and_the_citation() -> None:
    assert f"## [{rlhf.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rlhf.__version__
