"""Finds what is wrong with the stages of a pipeline, in a process of its own, before anything is trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rlhf.studies.processes import stage_processes


def complaints(jobs: Sequence[tuple[str, list[str]]], stand_ins: dict[str, str]) -> list[str]:
    """Returns what is wrong with the stages of a pipeline, one sentence each, before anything is trained.

    Args:
        jobs: name of each stage and its command line as for train.py, beginning with its command; in order.
        stand_ins: path that does not exist yet, such as an export of an earlier stage -> what stands in for it now. For
            exports, the model that the first stage starts from; for tables and data "": what reads them is skipped.
    """
    with TemporaryDirectory() as folder:
        task, found, log = (Path(folder) / name for name in ("task.json", "found.json", "log"))
        task.write_text(json.dumps({"jobs": jobs, "stand_ins": stand_ins}))
        ended = stage_processes.run(["rehearse", f"--task={task}", f"--output={found}"], log)
        stage_processes.check()
        if found.is_file():
            sentences: list[str] = json.loads(found.read_text())
            return sentences
        last = next(filter(None, map(str.strip, reversed(log.read_text(errors="replace").splitlines()))), "silently")
        return [f"the stages could not be looked at: the process ended with status {ended.status}, {last}"]
