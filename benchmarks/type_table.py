"""Checks every type of causal language model of transformers, and writes the table of types.

    python benchmarks/type_table.py                          every type
    python benchmarks/type_table.py --types llama mamba      some types
    python benchmarks/type_table.py --output docs/models.md  and write the table, or rows of it

A tiny model of random weights goes through SFT, reward model and PPO, each a step long, in a process of its own.
`type_checks.py` says what is compared with plain transformers. The exit status is 1 where a type is wrong or crashes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_types import model_types
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from type_checks import TypeResult

PASSES = "passes"
LIMIT = 180  # seconds that a type may take
PRELOAD = ["torch", "lightning.pytorch", "transformers", "datasets", "rlhf.modules"]  # imported once, then forked
SERVER = multiprocessing.get_context("forkserver")
COLOURS = {"passes": "green", "refused": "yellow", "wrong": "bold red", "crashes": "bold red"}
INTRODUCTION = """\
# Types of models

Of the {count} types of causal language models that transformers {version} has for text alone, {passes} pass all three
stages. The last column says what becomes of the others. Not counted are encoders and encoder-decoders, models that wrap
one of these types to read images or sound, and second names of a type.

Each was tried as a tiny model of random weights: a step of SFT, a step of the reward model, an update of PPO with
queries of unequal lengths and responses that end early. Compared with plain transformers, row by row, without cache
and padding: losses, rewards, values, log-probabilities, every sampled token, the ratio before the first step (1), and
the exports, loaded again. Other settings of a type (other kinds of layers, quantised weights) were not tried.

- **head:** whose class the reward model has. Exports of a class of transformers load with plain
  `AutoModelForSequenceClassification`; of one of ours after [one line](data.md#reward-models-of-any-type).
- **sampling:** `cache`: keys and values, rows that end leave; `own state`: the model's own, queries without padding;
  `no cache`: whole rows at every step, slower the longer they are.
- **largest difference:** relative to the largest number of its kind, or to 1.

`python benchmarks/type_table.py --output docs/models.md` makes this page; what is compared stands in
`benchmarks/type_checks.py`, and how the models are made in `benchmarks/model_types.py` and `.yaml`.
"""


def check_alone(model_type: str) -> TypeResult:
    """Checks a type in a process of its own."""
    from type_checks import Result, TypeResult

    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_check, args=(model_type, sender))
    process.start()
    sender.close()
    found = TypeResult(model_type, {"process": Result("crashes", f"nothing after {LIMIT} seconds")})
    with contextlib.suppress(EOFError):
        if receiver.poll(LIMIT):
            found = receiver.recv()
            process.join(LIMIT)
    process.kill()
    process.join()
    return found


def _check(model_type: str, sender: Any) -> None:
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
        import torch
        from type_checks import check_type

        torch.set_num_threads(1)
        sender.send(check_type(model_type, Path(name)))


def run_all(types: Sequence[str], jobs: int, show: Callable[[TypeResult], None]) -> list[TypeResult]:
    """Checks types, some at a time; the results have the order of the types."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(check_alone, name) for name in types]
        for future in as_completed(futures):
            show(future.result())
    return [future.result() for future in futures]


def markdown(results: Sequence[TypeResult], before: str = "") -> str:
    """Returns the page for `docs/`; types that are not among the results keep their row of the page before."""
    import transformers

    rows = {line.split("`")[1]: line for line in before.splitlines() if line.startswith("| `")}
    for result in results:
        worst = result.worst
        difference = f"{worst.difference:.0e}" if worst.status in ("passes", "wrong") else ""
        stage = next(name for name, stage in result.stages.items() if stage is worst)
        remark = PASSES if worst.status == "passes" else f"{stage} {worst.status}: {worst.detail}"
        cells = (f"`{result.model_type}`", result.head, result.sampling, difference, remark)
        rows[result.model_type] = (
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )
    passed = sum(row.endswith(f"| {PASSES} |") for row in rows.values())
    head = INTRODUCTION.format(version=transformers.__version__, count=len(rows), passes=passed)
    table = [
        "| type | head | sampling | largest difference | |",
        "|---|---|---|---|---|",
        *(rows[name] for name in sorted(rows)),
    ]
    return head + "\n" + "\n".join(table) + "\n"


def main() -> int:
    """Runs the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=model_types(), choices=model_types(), metavar="TYPE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="how many types at a time")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as Markdown, or these rows of it")
    options, start = parser.parse_args(), time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    SERVER.set_forkserver_preload(PRELOAD)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("types", total=len(options.types))

        def show(result: TypeResult) -> None:
            for stage, found in result.stages.items():
                colour = COLOURS[found.status]
                console.print(
                    f"{result.model_type:22} {stage:13} [{colour}]{found.status:8}[/] {found.difference:.0e} ", end=""
                )
                console.print(found.detail, markup=False)
            progress.advance(task)

        results = run_all(options.types, options.jobs, show)
    if options.output:
        before = options.output.read_text() if options.output.exists() else ""
        options.output.write_text(markdown(results, before))
    count = Counter(result.worst.status for result in results)
    console.print(f"{dict(count)}; {time.perf_counter() - start:.0f} s")
    return int(count["wrong"] + count["crashes"] > 0)


if __name__ == "__main__":
    sys.exit(main())
