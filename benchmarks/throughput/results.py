"""Makes medians, ratios and tables of the rows of both sides."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from throughput.fixtures import Shape
from throughput.needs import decoding_bytes, tokens_needed, training_flops
from throughput.record import PHASES, TRAINING, PPOTask, Row, Task

PEAKS = ("peak_rss_gib", "peak_device_gib")
LABELS = {
    "episodes_per_second": "episodes/s", "tokens_per_second": "real tokens/s", "real": "real tokens",
    "seconds": "seconds per update", "cpu_seconds": "CPU seconds, all threads",
    "forward": "training forward",
    "backward": "training backward", "optimizer": "optimizer step", "peak_rss_gib": "peak RSS, GiB",
    "peak_device_gib": "peak device memory, GiB", "processed": "tokens processed", "needed": "tokens needed",
    "processed_per_needed": "processed / needed", "response": "mean response, tokens",
    "other_cores": "cores that other processes used", "sampled_per_second": "sampling, tokens/s",
    "sampling_of_bandwidth": "sampling / limit of memory bandwidth", "training_mfu": "training, share of peak FLOPs",
}  # fmt: skip


def complete(row: Row, task: PPOTask) -> Row:
    """Adds to a row what follows from it, and takes its lists away."""
    queries, responses = row["queries"], row["responses"]
    needed = tokens_needed(queries, responses, task.ppo_epochs)
    return {
        "episodes_per_second": task.batch / row["seconds"],
        **{name: value for name, value in row.items() if name not in ("queries", "responses")},
        "needed": needed,
        "processed_per_needed": row["processed"] / needed,
        "response": mean(responses),
    }


def complete_stage(row: Row) -> Row:
    """Adds to a row of SFT or of the reward model what follows from it."""
    return {
        "tokens_per_second": row["real"] / row["seconds"],
        **row,
        "processed_per_needed": row["processed"] / row["real"],
    }


def on_device(row: Row, task: PPOTask, shape: Shape, tflops: float, gigabytes: float) -> Row:
    """Computes how near an update came to the limits of a device.

    Args:
        tflops: peak of the device in 10^12 operations per second.
        gigabytes: its memory bandwidth in 10^9 bytes per second.
    """
    queries, responses = row["queries"], row["responses"]
    seconds = sum(row[phase] for phase in ("forward", "backward", "optimizer"))
    width = 2 if task.precision.startswith("bf16") else 4
    least = decoding_bytes(shape, queries, responses, width) / (gigabytes * 1e9)
    flops = training_flops(shape, queries, responses, task.ppo_epochs)
    return {
        "sampled_per_second": sum(responses) / row["sampling"],
        "sampling_of_bandwidth": least / row["sampling"],
        "training_mfu": flops / (seconds * tflops * 1e12),
    }


def medians(rows: Sequence[Row]) -> Row:
    """Computes the median of each figure over the updates; of peaks the highest."""
    return {name: (max if name in PEAKS else median)(row[name] for row in rows) for name in rows[0]}


def ratios(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, float]:
    """Divides our figure by theirs, the first of a row, of the updates that were neighbours in time."""
    figure = next(iter(ours[0]))
    each = [a[figure] / b[figure] for a, b in zip(ours, theirs, strict=True)]
    return {"min": min(each), "median": median(each), "max": max(each)}


def show(title: str, of: str, sides: dict[str, list[Row]], task: Task) -> Row:
    """Prints the table of a comparison, and returns all of it.

    Args:
        of: what an update has `task.batch` of.
    """
    ratio = ratios(sides["ours"], sides["trl"]) if len(sides) == 2 else None
    middle = {side: medians(own) for side, own in sides.items()}
    updates = len(next(iter(sides.values())))
    title = f"{title}: medians of {updates} updates of {task.batch} {of}"
    Console(width=120).print(table(title, middle, ratio))
    return {"medians": middle, "ratio": ratio, "updates": sides}


def table(title: str, sides: dict[str, Row], ratio: dict[str, float] | None) -> Table:
    """Draws the medians of the sides beside one another."""
    drawn = Table("", *(("ours" if side == "ours" else "TRL") for side in sides), title=title)
    if ratio is not None:
        drawn.add_column("ours / TRL")
    first = next(iter(sides.values()))
    for name in first:
        if name == "peak_device_gib" and not first[name]:
            continue
        cells = [_number(row[name]) for row in sides.values()]
        if ratio is not None:
            cells.append(_ratio(name, sides, ratio))
        label = LABELS.get(name, f"  {name}" if name in (*PHASES, "rest") else name)
        drawn.add_row(f"  {label}" if name in TRAINING else label, *cells)
    return drawn


def _ratio(name: str, sides: dict[str, Row], ratio: dict[str, float]) -> str:
    if name == next(iter(sides["ours"])):
        return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    ours, theirs = (row[name] for row in sides.values())
    return f"{ours / theirs:.2f}" if theirs and name not in ("response", "other_cores", "loss") else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def lengths_table(cells: dict[tuple[int, int], float]) -> tuple[Table, Row]:
    """Draws seconds per episode over query and response length, and fits a sum of two linear costs.

    Args:
        cells: (tokens of the query, tokens of the response) -> seconds per episode.

    Returns:
        The table, and the least-squares fit: seconds per episode, per token of query and of response, and the largest
        deviation of a cell from it, as a share of the cell.
    """
    import numpy as np

    queries, responses = (sorted(set(column)) for column in zip(*cells, strict=True))
    drawn = Table("query", *(f"response {r}" for r in responses), title="seconds per episode (µs per token)")
    for q in queries:
        costs = [cells[q, r] for r in responses]
        drawn.add_row(str(q), *(f"{c:.4f} ({1e6 * c / (q + r):.0f})" for c, r in zip(costs, responses, strict=True)))
    terms = np.array([(1, q, r) for q, r in cells], dtype=float)
    costs = np.array(list(cells.values()))
    fit = np.linalg.lstsq(terms / costs[:, None], np.ones(len(costs)))[0]  # relative errors count alike
    deviation = np.abs(terms @ fit / costs - 1).max()
    names = ("per_episode", "per_query_token", "per_response_token", "largest_deviation")
    return drawn, dict(zip(names, (*fit.tolist(), float(deviation)), strict=True))
