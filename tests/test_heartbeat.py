"""Whatever happens to one of several processes, all end soon, with one sentence, and nothing is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf import heartbeat
from rlhf.heartbeat import TEMPORARY
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parent.parent
GO_ON = "All processes are ended; --ckpt_path last resumes a training run from its last checkpoint."
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")},
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "OMP_NUM_THREADS": "1",
}
Together = Callable[[str, int], tuple[list[int], str]]


@pytest.fixture
def together(driver: Callable[..., list[int]], tmp_path: Path) -> Together:
    """Lets something happen to one of three processes; returns how each has ended, and what was printed."""

    def together(event: str, rank: int) -> tuple[list[int], str]:
        log = tmp_path / "log"
        return driver(["together", f"--event={event}", f"--rank={rank}"], 3, log), log.read_text()

    return together


@pytest.mark.parametrize(
    ("event", "rank", "status", "own", "what"),
    [
        ("stop", 0, TEMPORARY, -signal.SIGKILL, r"has been silent for 0\.08 minutes"),
        ("stop", 2, TEMPORARY, -signal.SIGKILL, r"has been silent for 0\.08 minutes"),
        ("hang", 1, TEMPORARY, TEMPORARY, r"has been stuck for 0\.08 minutes"),
        ("kill", 0, TEMPORARY, -signal.SIGKILL, "has ended without a word"),
        ("kill", 2, TEMPORARY, -signal.SIGKILL, "has (ended without a word|been silent for .*)"),
        ("fail", 0, 2, 2, "the reward function is wrong"),
        ("fail", 2, 2, 2, "the reward function is wrong"),
    ],
)
def test_all_end_with_one_sentence(together: Together, event: str, rank: int, status: int, own: int, what: str) -> None:
    statuses, said = together(event, rank)
    assert statuses == [own if number == rank else status for number in range(3)], said
    if event == "fail":
        assert said == f"error: {what}.\n"
    else:
        name = rf"process {rank} \(\d+ on {socket.gethostname()}, last seen the work of the test, in "
        assert re.fullmatch(rf"error: {name}.*\) {what}\. {GO_ON}\n", said), said


def test_what_is_no_fault_of_the_user_has_one_traceback(together: Together) -> None:
    statuses, said = together("bug", 1)
    assert statuses == [1, 1, 1], said
    assert said.count("Traceback") == 1
    assert said.endswith("ValueError: unthought of\n")


def test_long_work_of_one_process_and_a_pause_of_all_are_no_silence(together: Together) -> None:
    assert together("work", 0) == ([0, 0, 0], "worked\n")


@pytest.fixture
def stage(tmp_path: Path, model_path: str, write_jsonl: Callable[..., str]) -> Callable[..., list[str]]:
    """The words of SFT on two processes, to the second of which something happens."""
    data, at = write_jsonl("d.jsonl", demonstrations(16, 1, "train")), "--trainer.callbacks"

    def words(event: str, hook: str, *more: str) -> list[str]:
        return [
            "fit", f"--config={ROOT}/configs/quickstart/sft.yaml", f"--run_dir={tmp_path}/run",
            f"--model.model_path={model_path}", f"--data.train.path={data}", f"--data.validation.path={data}",
            "--data.validation.split=train", "--data.batch_size=8", "--data.micro_batch_size=4",
            "--trainer.accelerator=cpu", "--trainer.devices=2", f"{at}+=resume_callbacks.Happens",
            f"{at}.event={event}", f"{at}.rank=1", f"{at}.hook={hook}", f"{at}.number=2", *more,
        ]  # fmt: skip

    return words


@pytest.mark.parametrize(
    ("hook", "silence", "what"),
    [
        ("on_train_batch_start", 3, r"process 1 \(.*, last seen train in epoch 1 after step [01], .*silent for 0\.2 "),
        ("__init__", 0.2, r"Not all 2 processes have connected within 0\.2 minutes"),
    ],
)
def test_a_stage_whose_processes_lightning_has_started(
    stage: Callable[..., list[str]], tmp_path: Path, hook: str, silence: float, what: str
) -> None:
    short = [f"--silence={silence}", "--trainer.callbacks+=resume_callbacks.ShortSilence"]
    command = [sys.executable, str(ROOT / "train.py"), *stage("stop", hook, *short)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=ENVIRONMENT)
    assert done.returncode == TEMPORARY, done.stderr[-3000:]
    assert_one_error(done.stderr, what)
    files = [Path(f"/proc/{number}/cmdline") for number in os.listdir("/proc") if number.isdigit()]
    assert [file for file in files if file.exists() and f"{tmp_path}/run" in file.read_text()] == []


def test_a_mistake_of_the_user_in_one_process_of_a_stage(
    stage: Callable[..., list[str]], driver: Callable[..., list[int]], tmp_path: Path
) -> None:
    assert driver(stage("fail", "on_train_batch_start"), 2, tmp_path / "log") == [2, 2]
    assert_one_error((tmp_path / "log").read_text(), r"the reward function is wrong\.$")


def assert_one_error(printed: str, what: str) -> None:
    assert "Traceback" not in printed
    assert len(re.findall("^error: ", printed, re.MULTILINE)) == 1, printed[-3000:]
    assert re.search(f"^error: {what}", printed, re.MULTILINE), printed[-3000:]


def test_two_threads_of_a_process_are_one_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """The heartbeat has spoken; then the main thread, which has lost the others by that, has nothing to say."""
    one = object.__new__(heartbeat.Heartbeat)
    one.rank, one.own_store = 0, torch.distributed.HashStore()
    for text in ("error: process 1 has been stuck.", "error: process 0 is cut off."):
        assert one.fail(text, 75)["status"] == 75
    assert capsys.readouterr().err == "error: process 1 has been stuck.\n"
