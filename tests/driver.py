"""Runs commands of train.py in forks of this one process, which has imported everything.

Reads a line of JSON per command, {"words": [...], "processes": 2, "log": "file", "nodes": false}, and answers with the
exit statuses.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

LONGEST = 300.0
PATIENCE = 20.0
BEFORE_IMPORTS = {"DS_ACCELERATOR": "cpu", "HF_UPDATE_DOWNLOAD_COUNTS": "False", "TOKENIZERS_PARALLELISM": "false"}
BEFORE_IMPORTS["TORCH_CPP_LOG_LEVEL"] = "ERROR"
IMPORTS = [
    "deepspeed", "rlhf.cli.main", "rlhf.cli.stage",
    # what a command imports only when it runs: data, the model, curves, and in DDP and DeepSpeed
    "datasets", "transformers.models.gpt_neox.modeling_gpt_neox", "transformers.trainer_pt_utils",
    "torch.utils.tensorboard", "torch._inductor.compile_fx", "deepspeed.module_inject.auto_ep_layer",
    "torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook", "scipy.io", "setuptools",
]  # fmt: skip


def main() -> None:
    os.environ |= BEFORE_IMPORTS
    for name in IMPORTS:
        importlib.import_module(name)
    sys.modules["rlhf.cli.main"].VERBS["together"] = ("heartbeat_ranks", "")
    gc.collect()
    gc.freeze()  # else the collector of every fork writes to, and so copies, all these pages
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(words: list[str], processes: int, log: str, nodes: bool) -> list[int]:
    """Exit statuses of all processes of a command; minus the number of the signal that has ended one.

    Args:
        nodes: each process is a node of its own, as Lightning starts it; else they are those of one node, as torchrun
            and Lightning start them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = {fork(words, ranks(rank, processes, nodes, port), log): rank for rank in range(processes)}
    statuses, deadline = [0] * processes, time.monotonic() + LONGEST
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[left.pop(pid)] = os.waitstatus_to_exitcode(status)
            deadline = min(deadline, time.monotonic() + PATIENCE)  # as a launcher does with what hangs
        elif time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return statuses


def ranks(rank: int, processes: int, nodes: bool, port: int) -> dict[str, str]:
    """The environment of a process, which tells it which one it is."""
    if processes == 1:
        return {}
    own = {"NODE_RANK": rank} if nodes else {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    return {name: str(value) for name, value in {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}


def fork(words: list[str], environment: dict[str, str], log: str) -> int:
    """The number of a process that runs a command as one of several."""
    pid = os.fork()
    if pid:
        return pid
    status: Any = 1
    try:
        os.environ |= environment
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        from rlhf.cli.main import main

        main(words)
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
