"""Measures a GPU, in parts of at most eight minutes each.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --part ppo
    python benchmarks/gpu.py --part ppo --rehearse       # the same on a CPU, with a model of a few thousand weights

Needs no network. After each case it prints a row for `benchmarks/RESULTS.md` with the device's name, so that a part
that is cut short has still given its rows; `--logs FOLDER` keeps what the cases print. A case whose package is missing
says so in its row. Ends with status 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from throughput import turns
from throughput.fixtures import SHAPES, config_of, prompt_lengths

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed
SECONDS = 480.0  # of a part; a case that it cuts short says so
FOLDERS = ["tests/ops", "tests/models", "tests/sampling", "tests/modules"]
BANDWIDTH = {"H200": 4800.0, "H100": 3350.0, "A100": 2039.0}  # GB/s, from their data sheets
ADAPTERS = ("--lora", '{"rank": 16}')
NO_GRAPHS = '{"cuda_graphs": false}'


class Case(NamedTuple):
    """Names a command, says how its output becomes a row, and which module it needs beside ours."""

    name: str
    words: list[str]
    rehearsal: list[str]
    row: Callable[[str], str]
    needs: str | None = None


def tests_row(output: str) -> str:
    """Returns the summary of pytest."""
    lines = [line.strip("= ") for line in output.splitlines() if " passed" in line or " failed" in line]
    return lines[-1] if lines else "no summary"


def ppo_row(output: str) -> str:
    """Formats episodes/s, shares of the limits, peak memory, and the ratio to TRL."""
    found = json.loads(output.splitlines()[-1])
    cells = []
    for regime in (r for r in ("full", "early") if r in found):
        for side, row in found[regime]["medians"].items():
            of = {name: f"{row[name]:.1%}" for name in ("sampling_of_bandwidth", "training_mfu") if name in row}
            estimated = f" ({estimated_gib(found['settings']):.1f} estimated)" if side == "ours" else ""
            cells.append(
                f"{regime}, {side}: {row['episodes_per_second']:.2f} episodes/s, sampling {row['sampling']:.2f} s "
                f"{of}, update {row['seconds']:.2f} s, {row['peak_device_gib']:.1f} GiB{estimated}"
            )
        if ratio := found[regime]["ratio"]:
            cells.append(f"ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    return "; ".join(cells)


def estimated_gib(settings: dict[str, Any]) -> float:
    """Returns the estimated peak of an update by `benchmarks/ppo_throughput.py` on one device."""
    from rlhf.models.adapters import LoRA
    from rlhf.models.memory import Workload, estimate

    shape, data = SHAPES[settings["shape"]], {"micro_batch_size": settings["micro"], "rollout_batch_size": 64}
    data |= settings["data"]
    rows = [min(data[f"{kind}_batch_size"], settings["batch"]) for kind in ("micro", "rollout")]
    longest = max(prompt_lengths(settings["batch"]))
    lora = settings.get("lora")
    adapters = {"lora": None if lora is None else LoRA(**lora), "quantization": settings.get("quantization")}
    run = Workload("ppo", "single", settings["precision"], 1, *rows, longest, settings["response_length"], **adapters)
    return max(phase.total for phase in estimate(config_of(shape), run).values()) / 2**30


def training_row(output: str) -> str:
    """Formats what the machine reaches, and the time, MFU and memory of each size."""
    found = json.loads(output.splitlines()[-1])
    copy, product = found["limits"].values()
    cells = [f"copy {copy:,.0f} GB/s, matrix product {product:,.0f} TFLOP/s"]
    for case in found["cases"]:
        name = f"{case['micro']} rows, activations {'again' if case['recompute'] else 'kept'}"
        peak = f"{case['peak_gib']:.1f} GiB ({case['estimated_gib']:.1f} estimated)" if "peak_gib" in case else ""
        text = case.get("failure") or f"{case['seconds']:.3f} s, MFU {case['mfu']:.1%} {peak}"
        cells.append(f"{name}: {text}")
    return "; ".join(cells)


def sampling_row(output: str) -> str:
    """Formats tokens/s and the share of the bandwidth of each way."""
    found = json.loads(output.splitlines()[-1])
    return "; ".join(
        f"{regime}, {way}: {x['tokens_per_second']:,.0f} tokens/s, {x['share_of_bandwidth']:.1%} of the bandwidth, "
        f"{x['times_generate']:.2f} x generate"
        for regime, ways in found.items()
        for way, x in ways.items()
    )


def placements_row(output: str) -> str:
    """Returns the rows that the benchmark prints itself."""
    return "\n".join(line for line in output.splitlines() if line.startswith("|"))


def update(
    name: str, *words: str, batch: int = 64, rows: int = 16, updates: int = 3, sides: str = "ours", shape: str = "1b"
) -> Case:
    """Returns the case of some updates of PPO."""
    command = [
        "benchmarks/ppo_throughput.py", "--sides", *sides.split(), "--updates", str(updates), "--regime", "full",
        *words,
    ]  # fmt: skip
    full = [
        "--shape", shape, "--device", "cuda", "--precision", "bf16-mixed", "--batch", str(batch), "--micro", "16",
        "--peak_bandwidth", bandwidth(), "--data", f'{{"micro_batch_size": {rows}, "rollout_batch_size": 64}}',
    ]  # fmt: skip
    tiny = ["--shape", "test", "--batch", "4", "--micro", "2", "--updates", "1", "--threads", "1"]
    quantised = "--quantization" in words  # in 8 bits, as not all CPUs have nf4 for matrices as small as these
    tiny += ["--quantization", "int8"] if quantised else []
    needs = "trl" if "trl" in sides else "bitsandbytes" if quantised else None
    return Case(name, [*command, *full], [*command, *tiny], ppo_row, needs)


def draws(name: str, *words: str) -> Case:
    """Returns the case of sampling at the 1B shape."""
    command = ["benchmarks/sampling.py"]
    full = ["--shape", "1b", "--rounds", "3", "--device", "cuda", "--peak_bandwidth", bandwidth(), *words]
    return Case(name, [*command, *full], [*command, "--shape", "test", "--rows", "4", "--rounds", "1"], sampling_row)


def parts() -> dict[str, list[Case]]:
    """Returns every part and its cases."""
    options = ["-m", "pytest", "-p", "no:cacheprovider"]
    folders = [Case(f, [*options, "--device", "cuda", "-n", "12", f], [*options, f, "-x"], tests_row) for f in FOLDERS]
    places, training = ["benchmarks/placements.py"], ["benchmarks/training.py"]
    return {
        "tests": folders,
        "ppo": [
            update("64 episodes"),
            update("64 episodes, without cuda_graphs", "--ppo", NO_GRAPHS),
            update("64 episodes, micro-batches of 32", rows=32),
            update("512 episodes, micro-batches of 32", batch=512, rows=32, updates=1),
        ],
        "lora": [
            update("1b, all weights", updates=2),
            *(
                update(f"{shape}, {what}", *ADAPTERS, *words, rows=rows, updates=updates, shape=shape)
                for shape, rows, updates in (("1b", 16, 2), ("6.9b", 8, 1))
                for what, words in (("adapters", ()), ("adapters on nf4", ("--quantization", "nf4")))
            ),
        ],
        "sampling": [draws("bf16", "--precision", "bf16"), draws("fp32", "--precision", "fp32", "--rows", "16")],
        "training": [
            Case(
                "forward and backward", [*training, "--shape", "1b", "--device", "cuda"],
                [*training, "--shape", "test", "--micro", "2", "--rounds", "1"], training_row,
            ),
        ],
        "trl": [
            update("64 episodes", sides="ours trl", updates=2),
            update("512 episodes, 32 rows for us", batch=512, rows=32, sides="ours trl", updates=1),
        ],
        "placements": [
            Case(
                "ZeRO-2", [*places, "--size", "1b", "--episodes", "64", "--micro_batch", "16", "--rollout_batch", "64"],
                places, placements_row, "deepspeed",
            ),
        ],
    }  # fmt: skip


def bandwidth() -> str:
    """Returns the memory bandwidth of the GPU in GB/s; of one that is not listed, that of an H100."""
    return next((str(speed) for name, speed in BANDWIDTH.items() if name in device_name()), str(BANDWIDTH["H100"]))


def device_name() -> str:
    """Returns the name of the GPU, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def lacks(case: Case) -> str | None:
    """Says why a case cannot be measured in this environment, if so."""
    if case.needs is None or find_spec(case.needs) is not None:
        missing = case.needs == "trl" and not turns.has_ppo()
        return "not measured: this release of trl has no PPO, 1.12.0 is the last that has" if missing else None
    return f"not measured: {case.needs} is not installed"


def run(case: Case, rehearse: bool, limit: float, log: Path | None) -> bool:
    """Runs a case, prints its row, and tells whether it succeeded."""
    start = time.monotonic()
    row, good = (lacks(case), True) if lacks(case) else measured(case, rehearse, limit, log)
    print(f"| {device_name()} | {case.name} | {row} | {time.monotonic() - start:.0f} s |", flush=True)
    return good


def measured(case: Case, rehearse: bool, limit: float, log: Path | None) -> tuple[str, bool]:
    """Runs the command of a case; returns its row and whether it succeeded."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        done: Any = subprocess.run(
            [sys.executable, *(case.rehearsal if rehearse else case.words)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=limit, env=environment,
        )  # fmt: skip
        output, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode() + f"\nstopped after {limit:.0f} s", True
    if log is not None:
        log.write_text(output)
    try:
        row = case.row(output) if not failed or case.row is tests_row else output[-1500:]
    except (ValueError, LookupError):
        row = output[-1500:]
    return row, not failed


def main() -> None:
    """Runs the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=parts(), default=[])
    parser.add_argument("--case", nargs="+", help="only the cases with these names")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a case, within the part's own")
    parser.add_argument("--logs", type=Path, help="folder for the output of the cases")
    options = parser.parse_args()
    if options.list:
        for part, cases in parts().items():
            print(part, *(f"  {case.name}: {' '.join(case.words)}" for case in cases), sep="\n")
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    good = True
    for part in options.part:
        end = time.monotonic() + SECONDS
        for number, case in enumerate(parts()[part]):
            if options.case and case.name not in options.case:
                continue
            log = options.logs / f"{part}{number}.log" if options.logs else None
            left = max(end - time.monotonic(), 1.0)
            good = run(case, options.rehearse, min(options.limit, left), log) and good
    sys.exit(not good)


if __name__ == "__main__":
    main()
