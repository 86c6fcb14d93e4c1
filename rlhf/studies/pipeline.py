"""Runs a pipeline: stages one after another, each in its own process."""

import time
from pathlib import Path
from typing import Any

from rlhf.studies.processes import stage_processes
from rlhf.studies.runner import Runner, Stage, filled, with_takes


def pipeline(
    stages: list[Stage],
    evaluation: list[Stage] | None = None,
    evaluation_takes: dict[str, dict[str, Any]] | None = None,
    size: str = "run",
    run_dir: str = "runs/pipeline",
    config_dir: str = ".",
    seed: int | None = None,
    arguments: list[str] | None = None,
) -> None:
    """Runs stages one after another, each in its own process, and hands their exports on.

    Finished stages are skipped; a stopped one is resumed from its last checkpoint. Tables and reports are made again
    when a stage that they are made from was run again. SIGTERM stops the current stage after it has saved.

    Args:
        stages: what to run, in order; the list, or a YAML file with it.
        evaluation: what to run after that, such as configs/evaluation/stages.yaml.
        evaluation_takes: command -> settings that its stages in `evaluation` take besides their own.
        size: name of the model size; it replaces `{size}` in stages.
        run_dir: folder of the whole run; every stage gets a folder in it.
        config_dir: folder of the configs of the stages.
        seed: seed of the data and of every training stage; it overrides the one in the config.
        arguments: further arguments for the command line of every training stage, such as `--trainer.devices=2`.
    """
    run = Path(run_dir)
    runner = Runner(run, Path(config_dir), seed, arguments or [])
    every = filled([*stages, *with_takes(evaluation, evaluation_takes)], size=size)
    started = time.monotonic()
    with stage_processes.forwarded_signals():
        for number, stage in enumerate(every, 1):
            runner.run_stage(stage, f"[{number}/{len(every)}]")
    print(f"Pipeline finished in {time.monotonic() - started:.0f} s: {run}")
    if (run / "report.md").exists():
        print(f"Report:  {run / 'report.md'}\nCurves:  tensorboard --logdir {run}")
