"""Several nodes: two of them with one process each, on this machine, started as on a cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import files
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parent.parent
LAUNCHERS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def with_torchrun(words: list[str]) -> None:
    """Runs a command on both nodes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--master_addr=127.0.0.1"]
    start.append(f"--master_port={free_port()}")
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*start, f"--node_rank={node}", str(ROOT / "train.py"), *words],
            env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    printed = [node.communicate(timeout=500)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)[-4000:]


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_two_nodes_make_one_run(
    launcher: str, tmp_path: Path, model_path: str, write_jsonl: Callable[..., str], driver: Callable[..., list[int]]
) -> None:
    """By torchrun, and one by one with the variables that Lightning reads."""
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(16, 1, "train"))
    ScalarModel.from_policy(model_path, 3).save(tmp_path / "reward", load_tokenizer(model_path))
    words = [
        "fit", f"--config={ROOT}/configs/quickstart/ppo.yaml", f"--run_dir={tmp_path}/run",
        f"--model.model_path={model_path}", f"--model.reward_path={tmp_path}/reward", f"--data.train.path={prompts}",
        f"--data.validation={{path: {prompts}, limit: 5}}", "--data.batch_size=8", "--data.micro_batch_size=4",
        "--model.ppo.response_length=6", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1",
        "--trainer.accelerator=cpu", "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp",
    ]  # fmt: skip
    if launcher == "lightning":
        log = tmp_path / "log"
        assert driver(words, 2, log, nodes=True) == [0, 0], log.read_text()[-4000:]
    else:
        with_torchrun(words)
    curves = read_curves(tmp_path / "run")
    assert curves["episode"].tolist() == [8, 16]
    assert curves["val/ratio_max_deviation"].max() < 1e-5
    assert curves["invariants/ranks"].max() == 0
    assert (tmp_path / "run" / "export" / "rlhf.json").is_file()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock", ".owner.json", "checkpoints", "config.yaml", "curves.jsonl", "export", "tensorboard",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "main"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_one_process_of_all_nodes_is_the_main_one(
    environment: dict[str, str], main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert files.is_main_process() is main
