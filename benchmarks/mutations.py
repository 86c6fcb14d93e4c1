"""Breaks the details one at a time and shows that the tests notice each of them: the mutation check.

    python benchmarks/mutations.py                          every mutant
    python benchmarks/mutations.py --only D26 "EOS trick off"   those of a detail, or by name

The mutants stand in `mutants.yaml`, and in a table on the documentation site. Each is applied to a copy of the tree;
its own tests run on it, and where these pass, the whole suite does. A mutant that still passes is a survivor: a detail
that no test holds. One that no longer imports proves nothing and is invalid. The exit status is 1 where there is either
of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MUTANTS = HERE / "mutants.yaml"
OWN_TEST = "tests/test_mutations.py"  # fails on every mutant, whose `old` text is gone
LIMIT = 1800  # seconds that a run of tests may take
LIBRARIES = ["torch", "lightning.pytorch", "transformers"]  # slow to import: done once, then forked
SERVER = multiprocessing.get_context("forkserver")
FAILURE = re.compile(r"^(?:FAILED|ERROR) ([^\s[]+)(.*)", re.MULTILINE)  # the parameters of a test belong to the reason
BROKEN = re.compile(r" - (SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError)\b")


@dataclass(frozen=True)
class Mutant:
    """Changes one file so that one detail is broken.

    Attributes:
        name: a few words, unique.
        detail: `D01` to `D39`, or `R`: that nothing is lost.
        breaks: what is wrong with it, in one sentence.
        file: the file that is changed.
        old: text that stands in it exactly once.
        new: what takes its place.
        tests: files or node ids of the tests that should notice.
    """

    name: str
    detail: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, tree: Path) -> None:
        """Changes the file in a copy of the tree."""
        file = tree / self.file
        text = file.read_text() if file.is_file() else ""
        if text.count(self.old) != 1:
            raise OutdatedError(f"{self.detail}, {self.name}: `old` stands {text.count(self.old)} times in {self.file}")
        file.write_text(text.replace(self.old, self.new))


class OutdatedError(Exception):
    """A mutant no longer fits the code."""


@dataclass(frozen=True)
class Verdict:
    """Says what became of a mutant: `by` is the test that failed, or why the mutant is invalid."""

    status: Literal["caught", "survived", "invalid"]
    by: str = ""
    seconds: float = 0.0


def load_mutants(only: Sequence[str] = ()) -> list[Mutant]:
    """Returns the mutants, or those whose detail or name is in `only`."""
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in yaml.safe_load(MUTANTS.read_text())]
    unknown = set(only) - {m.name for m in mutants} - {m.detail for m in mutants}
    if unknown:
        sys.exit(f"--only: there is no mutant {' or '.join(sorted(unknown))}; see --list.")
    return [m for m in mutants if not only or {m.name, m.detail} & set(only)]


# --------------------------------------------------------------------------------------------------- trees and tests


def copy_tree(target: Path) -> Path:
    """Copies what git tracks or would track, as it is now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run_tests(tree: Path, tests: Iterable[str], workers: int = 0) -> tuple[int | None, str]:
    """Runs tests (none: the whole suite) in a copy of the tree up to the first failure; returns status and output."""
    scratch = Path(tempfile.mkdtemp(dir=tree.parent))
    arguments = [
        "-x", "-q", "-n", str(workers), "-rfE", "--tb=short", "-p", "no:cacheprovider",
        f"--basetemp={scratch / 'pytest'}", f"--ignore={OWN_TEST}", *tests,
    ]  # fmt: skip
    process = SERVER.Process(target=_pytest, args=(tree, scratch, arguments))
    process.start()
    process.join(LIMIT)
    process.kill()
    process.join()
    output = (scratch / "output").read_text()
    shutil.rmtree(scratch, ignore_errors=True)
    return process.exitcode, output


def _pytest(tree: Path, scratch: Path, arguments: list[str]) -> None:
    """Runs in a process of its own, which has imported the libraries but nothing of the package."""
    with (scratch / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {"PYTHONPATH": str(tree), "HF_DATASETS_CACHE": str(scratch / "datasets"), "COLUMNS": "1000"}
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    import pytest

    sys.exit(pytest.main(arguments))


def judge(status: int | None, output: str) -> Verdict:
    """Returns what pytest's exit status and output say of a mutant.

    Only a failed test counts. A mutant that can't be imported, or that names what does not exist, would fail whatever
    is tested.
    """
    if status == 0:
        return Verdict("survived")
    test, reason = next(iter(FAILURE.findall(output)), ("", output.strip()[-200:] or "no output"))
    if "::" not in test or BROKEN.search(reason):
        return Verdict("invalid", f"{test}{reason}")
    return Verdict("caught", test)


def check(mutant: Mutant, folder: Path, tests: Iterable[str], workers: int = 0) -> Verdict:
    """Applies a mutant to a fresh copy of the tree and runs tests on it."""
    start = time.perf_counter()
    tree = copy_tree(Path(tempfile.mkdtemp(dir=folder)))
    mutant.apply(tree)
    verdict = judge(*run_tests(tree, tests, workers))
    shutil.rmtree(tree)
    return Verdict(verdict.status, verdict.by, time.perf_counter() - start)


def check_baseline(folder: Path, mutants: list[Mutant], tests: Iterable[str], workers: int) -> None:
    """Stops where a mutant no longer fits, or where the tests fail without any mutant: they would catch everything."""
    tree = copy_tree(Path(tempfile.mkdtemp(dir=folder)))
    problems = []
    for mutant in mutants:
        before = (tree / mutant.file).read_text() if (tree / mutant.file).is_file() else ""
        try:
            mutant.apply(tree)
            (tree / mutant.file).write_text(before)
        except OutdatedError as error:
            problems.append(str(error))
    if problems:
        sys.exit("These mutants no longer fit the code:\n" + "\n".join(problems))
    verdict = judge(*run_tests(tree, tests, workers))
    if verdict.status != "survived":
        sys.exit(f"The tests fail without any mutant: {verdict.by}")
    shutil.rmtree(tree)


# --------------------------------------------------------------------------------------------------------- the report


def report(console: Console, mutant: Mutant, verdict: Verdict) -> None:
    """Prints one line, as soon as it is known."""
    style = {"caught": "green", "survived": "bold red", "invalid": "yellow"}[verdict.status]
    row = Table.grid(padding=(0, 2), expand=True)
    for width, ratio in ((3, None), (None, 2), (8, None), (None, 3), (6, None)):
        row.add_column(width=width, ratio=ratio, overflow="fold")
    row.add_row(mutant.detail, mutant.name, f"[{style}]{verdict.status}", verdict.by, f"{verdict.seconds:.1f} s")
    console.print(row)


def run_all(mutants: list[Mutant], folder: Path, jobs: int, show: Callable[[Mutant, Verdict], None]) -> dict:
    """Returns the verdict of every mutant's own tests."""
    results: dict[Mutant, Verdict] = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(check, m, folder, m.tests): m for m in mutants}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            show(futures[future], future.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return {m: results[m] for m in mutants}


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="MUTANT", help="details (D26) or names of mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="how many mutants at a time")
    parser.add_argument("--list", action="store_true", help="show the mutants and stop")
    parser.add_argument("--targeted-only", action="store_true", help="never run the whole suite")
    return parser.parse_args()


def main() -> int:
    """Runs the check."""
    options, start = parse(), time.perf_counter()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    os.environ["OMP_NUM_THREADS"] = "1"
    SERVER.set_forkserver_preload(LIBRARIES)
    mutants = load_mutants(options.only)
    if options.list:
        for m in mutants:
            console.print(f"{m.detail}  [bold]{m.name}[/bold]: {m.breaks} ({m.file})", soft_wrap=True)
        return 0
    with tempfile.TemporaryDirectory() as name, Progress(console=console, transient=True) as progress:
        folder = Path(name)
        task = progress.add_task("without mutants", total=None)
        workers = options.jobs if options.jobs > 1 else 0
        check_baseline(folder, mutants, sorted({test for m in mutants for test in m.tests}), workers)
        progress.update(task, description="mutants", total=len(mutants))

        def show(mutant: Mutant, verdict: Verdict) -> None:
            report(console, mutant, verdict)
            progress.advance(task)

        results = run_all(mutants, folder, options.jobs, show)
        passed = [m for m, verdict in results.items() if verdict.status == "survived"]
        if passed and not options.targeted_only:
            progress.update(task, description="whole suite", total=len(passed), completed=0)
            check_baseline(folder, mutants, (), workers)
            for mutant in passed:
                results[mutant] = check(mutant, folder, (), workers)
                show(mutant, results[mutant])
    kinds = {s: [m for m, v in results.items() if v.status == s] for s in ("caught", "survived", "invalid")}
    counts = ", ".join(f"{len(found)} {status}" for status, found in kinds.items())
    console.print(f"{len(results)} mutants: {counts}; {time.perf_counter() - start:.0f} s")
    for mutant in kinds["survived"] + kinds["invalid"]:
        console.print(f"[bold red]{results[mutant].status}[/]: {mutant.detail}, {mutant.name}: {mutant.breaks}")
    return int(len(kinds["caught"]) < len(results))


if __name__ == "__main__":
    sys.exit(main())
