"""vLLM in what a user starts: several processes, a kill, tables of responses, a judge."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.sources import Source
from rlhf.evaluation.generate import generate
from rlhf.evaluation.judges import LocalJudge, Pair
from rlhf.report.curve_files import read_curves
from rlhf.sampling import vllm_engine
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.vllm


def start(words: list[str], launcher: Iterable[str] = ()) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-3000:]


def descendants(pid: int) -> set[int]:
    """Returns all processes below one."""
    found = {int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()}
    return found | {below for child in found for below in descendants(child)}


def wait(until: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 240
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def words(wide_path: str, tmp_path: Path, write_jsonl: Callable[..., str]) -> list[str]:
    """PPO on a handful of prompts by two processes, with a validation after each update."""
    file = write_jsonl("prompts.jsonl", demonstrations(8, 1, "train"))
    return [
        "fit", f"--config={ROOT}/configs/quickstart/ppo.yaml", f"--run_dir={tmp_path}/run",
        f"--model.model_path={wide_path}", "--model.reward_path=null", "--model.evaluation_function=null",
        "--model.reward_function=examples.short_answers.number_of_words", "--model.sampler=vllm",
        "--model.ppo.vllm_cache_gib=0.05", "--model.ppo.critic_warmup=0", "--model.ppo.response_length=8",
        f"--data.train.path={file}", f"--data.validation.path={file}", "--data.validation.split=train",
        "--data.batch_size=8", "--data.micro_batch_size=2", "--trainer.check_val_every_n_epoch=1",
        "--trainer.devices=2",
    ]  # fmt: skip


def assert_sampled_by_the_policy(run: Path, updates: int) -> None:
    curves = read_curves(run)
    differences = curves["rollout/engine_difference"].dropna()
    assert len(differences) == updates
    assert (differences < 1e-5).all()
    assert (differences > 0).any()
    assert (curves["val/ratio_max_deviation"].dropna() < 1e-5).all()


def test_an_engine_per_process_of_ddp(words: list[str], tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended(start([*words, "--trainer.strategy=ddp", "--trainer.max_epochs=2"], torchrun))
    assert_sampled_by_the_policy(tmp_path / "run", 2)


def test_a_killed_run_of_zero2_leaves_no_engine_and_goes_on(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--trainer.strategy=zero2", "--trainer.max_epochs=12"]
    killed, checkpoint = start(words), tmp_path / "run" / "checkpoints" / "last.ckpt"
    wait(lambda: killed.poll() is not None or checkpoint.exists())
    assert killed.poll() is None
    below = descendants(killed.pid)
    assert len(below) >= 3  # rank 1, and the engine of each
    for pid in (killed.pid, *(pid for pid in below if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())):
        os.kill(pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    ended(start([*words, "--ckpt_path=last"]))
    assert_sampled_by_the_policy(tmp_path / "run", 12)


@pytest.fixture
def sharp(wide_path: str, tmp_path: Path) -> str:
    """The small model with an output layer so large that two tokens are never equally probable."""
    folder = str(tmp_path / "sharp")
    model: Any = AutoModelForCausalLM.from_pretrained(wide_path)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(wide_path).save_pretrained(folder)
    return folder


def test_tables_are_those_of_the_builtin_sampler(
    sharp: str, tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Source(write_jsonl("validation.jsonl", demonstrations(11, 1, "validation")))
    settings: dict[str, Any] = {"model": sharp, "data": data, "response_length": 6, "batch_size": 4}
    expected = generate(str(tmp_path / "builtin.parquet"), **settings)
    handed = []

    def weights(model: Any) -> Iterable[Any]:
        handed.append(model)
        return merged(model)

    merged = vllm_engine.merged_weights
    monkeypatch.setattr(vllm_engine, "merged_weights", weights)
    found = generate(str(tmp_path / "vllm.parquet"), **settings, sampler="vllm", vllm_cache_gib=0.05)
    assert found["response"].tolist() == expected["response"].tolist()
    assert len(handed) <= 2  # not for each of three batches: at the start, and for longer rows


def test_a_judge_by_vllm_answers_as_the_builtin_one(sharp: str, tmp_path: Path) -> None:
    pairs = [Pair("Sold my car.", " it is sold", " a car", {}), Pair("x", " y", " z and some more", {})]
    found = {}
    for engine in ("builtin", "vllm"):
        judge = LocalJudge(sharp, labels=(" first one", " second"), engine=engine)  # type: ignore[arg-type]
        judge.prepare(tmp_path / f"{engine}.jsonl")
        answers = judge.prefer(pairs)
        numbers = [float(x) for q in judge._asked for x in judge._answers.of(q.key)[0].text.split()]
        found[engine] = answers, torch.tensor(numbers)
    assert found["vllm"][0] == found["builtin"][0]
    torch.testing.assert_close(found["vllm"][1], found["builtin"][1], atol=3e-4, rtol=1e-5)
