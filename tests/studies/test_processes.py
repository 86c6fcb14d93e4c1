"""Stages as processes: how they end, what reaches them, and several at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from rlhf import files
from rlhf.cli.main import main
from rlhf.studies.processes import Ended, StageProcesses

LONG = ["synthesize", "--sizes.pretraining=1000000"]


def long_stage(processes: StageProcesses, pool: ThreadPoolExecutor, folder: Path) -> Future[Ended]:
    """A stage that has just been started, and would run for minutes."""
    future = pool.submit(processes.run, [*LONG, f"--output={folder}"])
    while not processes.running and not future.done():
        time.sleep(0.01)
    return future


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_status_of_a_stage_tells_what_ended_it(number: signal.Signals, tmp_path: Path) -> None:
    """A signal that comes while a stage is just starting is not lost."""
    processes = StageProcesses()
    with processes.forwarded_signals(), ThreadPoolExecutor() as pool:
        future = long_stage(processes, pool, tmp_path)
        child = next(iter(processes.running))
        os.kill(os.getpid() if number == signal.SIGTERM else child.pid or 0, number)
        assert future.result(timeout=60).status == -number
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as stop:
            processes.run(["--help"])  # nothing starts any more
        assert stop.value.code == 128 + number


def test_several_threads_can_run_stages(tmp_path: Path) -> None:
    processes = StageProcesses()
    run: Callable[[int], Ended] = lambda n: processes.run(["--help"], tmp_path / f"{n % 3}.log")  # noqa: E731
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(run, range(24)))
    assert [e.status for e in ended] == [0] * 24
    assert all(0 < e.peak_gib < 4 and e.seconds > 0 for e in ended)
    assert (tmp_path / "0.log").read_text().count("usage: python train.py COMMAND") == 8
    assert processes.run(["nonsense"], tmp_path / "wrong.log").status == 2
    assert "unknown command 'nonsense'" in (tmp_path / "wrong.log").read_text()


def test_the_page_of_a_pipeline_names_what_the_user_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.csv").write_text("query,a,b,outcome\nq,x,y,a\nr,x,y,b\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "pipeline", "--config", "my config.yaml"])
    words = ["report", "--runs", str(tmp_path / "mine.csv"), "--output", str(tmp_path / "out")]
    assert StageProcesses().run(words, tmp_path / "log").status == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<pre>python train.py pipeline --config &#39;my config.yaml&#39;</pre>" in page


def owner(folder: Path) -> int:
    """The number of the process that owns a folder, once there is one."""
    deadline = time.monotonic() + 120
    while not (folder / files.OWNER).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(json.loads((folder / files.OWNER).read_text())["pid"])


@pytest.fixture
def sft_config(tmp_path: Path, model_path: str, demonstration_file: str) -> Path:
    """A small SFT run that saves after every 40 steps, and would go on for minutes."""
    config = {
        "model": {"class_path": "SFTModule", "init_args": {"model_path": model_path, "response_length": 4}},
        "data": {"class_path": "SFTDataModule", "init_args": {
            "train": {"path": demonstration_file}, "batch_size": 8, "micro_batch_size": 8}},
        "trainer": {"accelerator": "cpu", "max_epochs": 10_000, "callbacks": [{
            "class_path": "rlhf.callbacks.last_checkpoint.LastCheckpoint", "init_args": {"every_n_epochs": 10}}]},
    }  # fmt: skip
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_one_of_two_runs_that_start_in_one_folder_is_refused(tmp_path: Path, sft_config: Path) -> None:
    logs = [tmp_path / "1.log", tmp_path / "2.log"]
    words = ["fit", f"--config={sft_config}", f"--run_dir={tmp_path}/run", "--trainer.max_epochs=20"]
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(StageProcesses().run, [words] * 2, logs))
    assert sorted(e.status for e in ended) == [0, 2]
    said = logs[0 if ended[0].status else 1].read_text()
    assert "is in use by" in said  # the other process may not have written down yet which one it is
    assert f"--run_dir={tmp_path}/run" in said


def test_a_second_pipeline_is_refused_and_a_killed_one_leaves_nothing_running(
    tmp_path: Path, sft_config: Path, driver: Callable[..., list[int]], capsys: pytest.CaptureFixture[str],
    model_path: str, demonstration_file: str,
) -> None:  # fmt: skip
    """`kill -9` of a pipeline: its stage saves and stops, and the folder is free."""
    run, last, log = tmp_path / "run", tmp_path / "run" / "sft" / "checkpoints" / "last.ckpt", tmp_path / "log"
    words = [
        "pipeline", f"--run_dir={run}", f"--model={model_path}", f"--demonstrations={demonstration_file}",
        f"--sft={json.dumps({'config': str(sft_config), 'data': {'validation': None}})}", "--reward=false",
        "--ppo=false",
    ]  # fmt: skip
    first = threading.Thread(target=driver, args=(words, 1, log))
    first.start()
    stage = owner(run / "sft")
    with pytest.raises(SystemExit):
        main(words)
    pipeline = owner(run)
    assert f"{run} is in use by process {pipeline} on " in capsys.readouterr().err
    while not last.exists():  # after 40 steps
        time.sleep(0.05)
    saved = torch.load(last, weights_only=True)["global_step"]
    time.sleep(0.2)  # for a step more
    os.kill(pipeline, signal.SIGKILL)
    first.join()
    with files.owned(run), files.owned(run / "sft", patience=60):  # as the next pipeline waits
        assert "Stopped by SIGTERM after" in log.read_text()
        assert torch.load(last, weights_only=True)["global_step"] > saved
    deadline = time.monotonic() + 60
    while Path(f"/proc/{stage}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_trains_with_others_ends_with_the_one_that_started_it() -> None:
    code = "import time; from rlhf.studies.processes import end_with_parent; end_with_parent(0.1); print(flush=True)"
    child = [sys.executable, "-c", f"{code}; time.sleep(100)"]
    parent = f"import subprocess; subprocess.Popen({child}, stdout=-1).stdout.readline()"
    subprocess.run([sys.executable, "-c", parent], stderr=-1, timeout=60, check=True)  # until stderr is closed
