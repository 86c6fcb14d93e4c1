"""Records the updates of what is to be timed; a worker process takes its turns on the word of its parent."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINING = ("forward", "backward", "optimizer")
PHASES = ("sampling", "reference", "values", "reward", *TRAINING)
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Says what both sides do.

    Attributes:
        folder: the fixtures.
        batch: examples per optimizer step (PPO: episodes per update).
        updates: how many, the first one included, which is not counted.
        micro: TRL's `per_device_train_batch_size`.
        data: settings of our DataModule beside the batch size.
        precision: as Lightning names it.
        device: `cpu` or `cuda`.
        learning_rate: the paper's.
    """

    folder: str
    batch: int = 64
    updates: int = 5
    micro: int = 8
    data: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    device: str = "cpu"
    threads: int = 1
    learning_rate: float = 3e-6


@dataclass(frozen=True)
class PPOTask(Task):
    """Says what an update of PPO is.

    Attributes:
        ppo: settings of our `PPOSettings` beside those that both sides share.
        lora: settings of our `LoRA`; None: all weights are trained.
        quantization: of the base of the adapters.
        response_length, temperature, ppo_epochs: the paper's, on both sides.
    """

    ppo: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    quantization: Literal["nf4", "int8"] | None = None
    response_length: int = 53
    temperature: float = 0.7
    ppo_epochs: int = 4

    @property
    def longest_query(self) -> int:
        """Counts the tokens of the longest prompt."""
        lines = (Path(self.folder) / "prompts.jsonl").read_text().splitlines()
        return max(len(json.loads(line)["prompt"].split()) for line in lines)


@dataclass(frozen=True)
class StageTask(Task):
    """Says what an optimizer step of SFT or of the reward model is.

    Attributes:
        stage: `sft` or `reward`.
        loss_on: what SFT's loss is on, as our `SFTModule` names it.
        trl: settings of TRL's `SFTConfig` or `RewardConfig` beside those that both sides share.
        learning_rate: so large that the losses show whether both sides learn the same, and that bfloat16 still agrees.
    """

    stage: Literal["sft", "reward"] = "sft"
    loss_on: Literal["all", "response"] = "all"
    trl: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-5


TaskT = TypeVar("TaskT", bound=Task)


class Recorder:
    """Times the updates of one side.

    Args:
        device: `cpu` or `cuda`.
        begin: called before every update, off the clock.
        end: called with the row of every update, off the clock.
        phases: that are timed.
    """

    def __init__(
        self, device: str, begin: Callable[[], None], end: Callable[[Row], None], phases: Sequence[str] = PHASES
    ) -> None:
        self.device, self.begin, self.end, self.phases = device, begin, end, phases
        self.seconds: Counter[str] = Counter()
        self._spans: list[tuple[str, Any, Any]] = []
        self.processed = 0
        self.real: Any = 0
        self.running = False

    def now(self) -> Any:
        """Marks a moment in what the device is asked to do; to wait for it would keep the CPU from running ahead."""
        import torch

        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, phase: str, start: Any, end: Any) -> None:
        """Counts what is between two moments as part of a phase."""
        self._spans.append((phase, start, end))

    def _wall(self) -> float:
        """Returns the time in seconds, after all that the device was asked to do."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def count(self, *models: nn.Module, pad_id: int | None = None) -> None:
        """Counts every token that goes into these models, padding too, and those that are no padding.

        Args:
            pad_id: of the padding; None: nobody asks for the real ones.
        """

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.processed += inputs[0].numel()
            if pad_id is not None:
                self.real = self.real + (inputs[0] != pad_id).sum()

        for model in models:
            model.get_input_embeddings().register_forward_hook(add)  # type: ignore[operator]

    def start(self) -> None:
        """Begins an update, when it is this side's turn."""
        self.begin()
        self.seconds.clear()
        self._spans.clear()
        self.processed, self.real, self.running = 0, 0, True
        self._busy, self._own, self._start = _busy_seconds(), time.process_time(), self._wall()

    def stop(self, **known: Any) -> None:
        """Ends an update.

        Args:
            known: what else the row has, for PPO `queries` and `responses`: the real tokens of every episode.
        """
        seconds = self._wall() - self._start
        own = time.process_time() - self._own
        others = _busy_seconds() - self._busy - own
        self.running = False
        for phase, start, end in self._spans:
            self.seconds[phase] += start.elapsed_time(end) / 1e3 if self.device == "cuda" else end - start
        phases = {phase: self.seconds[phase] for phase in self.phases}
        self.end({
            "seconds": seconds, "cpu_seconds": own, **phases, "rest": seconds - sum(phases.values()),
            "processed": self.processed, **known, "peak_rss_gib": _peak_rss_gib(),
            "peak_device_gib": _peak_device_gib(self.device), "other_cores": max(0.0, others / seconds),
        })  # fmt: skip

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside."""
        start = self.now()
        yield
        self.add(name, start, self.now())


def _busy_seconds() -> float:
    """Sums the busy seconds of all cores of the machine, for all processes."""
    import psutil

    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def _peak_rss_gib() -> float:
    """Returns the peak of this process; `getrusage` would count its parent too, from which it was started."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _peak_device_gib(device: str) -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def work(kind: type[TaskT], measure: Callable[[TaskT, Callable[[], None], Callable[[Row], None]], None]) -> None:
    """Works as a process: a line on standard input is a turn; its row goes to standard output, all else to the errors.

    After its last row it waits for its end: the work of an orderly one would disturb the other side.
    """
    import torch

    task = kind(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    left = task.updates

    def begin() -> None:
        if not sys.stdin.readline():
            os._exit(0)

    def end(row: Row) -> None:
        nonlocal left
        print(json.dumps(row), file=out, flush=True)
        left -= 1
        if not left:
            begin()

    measure(task, begin, end)
