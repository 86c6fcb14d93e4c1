"""The pipeline: from a model and data to a report, each stage in a process of its own."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
from pydantic import PositiveInt

from rlhf import files
from rlhf.data.sources import Source
from rlhf.errors import Fraction, Positive, Seed, UserError
from rlhf.report.run_findings import all_findings
from rlhf.studies.preflight import complaints
from rlhf.studies.processes import stage_processes
from rlhf.studies.recipe import Recipe, Shared
from rlhf.studies.runner import TABLES, Runner, Settings, Stage
from rlhf.studies.shipped import find_shipped
from rlhf.studies.trial import try_stages


class Result(NamedTuple):
    """What a pipeline has made.

    Attributes:
        run: its folder.
        exports: stage -> folder of the model that it trained.
        report: the page; None where nothing was trained.
        summary: the table on top of the page, a row per policy; None where nothing was evaluated.
        findings: what speaks against the run, such as a policy that has learnt nothing; empty if nothing does.
    """

    run: Path
    exports: dict[str, Path]
    report: Path | None
    summary: pd.DataFrame | None
    findings: list[str]


def pipeline(
    run_dir: str = "runs/pipeline",
    model: str | None = None,
    demonstrations: str | Source | None = None,
    comparisons: str | Source | None = None,
    prompts: str | Source | None = None,
    validation: Fraction | None = None,
    validation_seed: int = 0,
    reward_model: str | None = None,
    reward_function: str | None = None,
    judge: str | Settings | None = None,
    text: Settings | None = None,
    response_length: PositiveInt | None = None,
    pad_token: str | None = None,
    eos_tokens: list[str] | None = None,
    learning_rate: Positive | Literal["auto"] | None = None,
    best: str | None = None,
    lora: Settings | None = None,
    quantization: str | None = None,
    devices: int | str | None = None,
    trainer: Settings | None = None,
    seed: Seed | None = None,
    synthesize: Settings | None = None,
    sft: Settings | bool | None = None,
    reward: Settings | bool | None = None,
    ppo: Settings | bool | None = None,
    generate: Settings | None = None,
    margins: Settings | bool | None = None,
    report: Settings | None = None,
    size: str | None = None,
    config_dir: str = ".",
    redo: list[str] | None = None,
    check: bool = False,
    overrides: dict[str, Settings] | None = None,
) -> Result:
    """Runs SFT, reward model, PPO and their evaluation, each in its own process, and writes a report.

    Finished stages are skipped; a stopped one is resumed from its last checkpoint. Tables and reports are made again
    when a stage that they are made from was run again. SIGTERM stops the current stage after it has saved.

    Any setting of a stage can follow its name: `--ppo.model.ppo.kl_coefficient 0.1`, `--sft.trainer.max_epochs 2`. In
    a file, the settings of a stage stand in its section, and `config` in it names files in `config_dir` that are read
    before; `false` leaves the stage out.

    Args:
        run_dir: folder of the whole run; every stage gets a folder in it.
        model: the model to start from: a folder, or a name on the hub.
        demonstrations: what SFT learns from and PPO takes its prompts from: a file, folder or hub dataset, or a
            `Source`. Without them SFT learns the preferred side of the comparisons.
        comparisons: what the reward model learns from.
        prompts: prompts for PPO, if not those of the demonstrations.
        validation: share of the queries that is kept for validation, the same ones of all files; by default 0.05 of a
            single file, and the split `validation` of a folder or hub dataset.
        validation_seed: another one chooses other queries.
        reward_model: a trained reward model, `ForSequenceClassification` with one label: no reward model is trained.
        reward_function: import path of a function that scores responses: no reward model is trained.
        judge: who compares responses with the references, a class or `class_path` and `init_args`; by default the
            reward model, which PPO has learnt to please.
        text: formats and maximum lengths of texts, as in `data.text` of every stage.
        response_length: longest response in tokens, for SFT, PPO and their evaluation.
        pad_token: PAD, where the tokenizer has none or it is EOS.
        eos_tokens: tokens that end a response.
        learning_rate: of all three trained stages; `auto`, the default where no section names files: a rule of thumb by
            the size of the model.
        best: a curve of PPO, such as `validation/score`, by which the best export is kept beside the last one.
        lora: train adapters in all three stages, with these settings of `model.lora`, such as `rank`.
        quantization: `nf4` or `int8`: with adapters, store the matrices of their base in 4 or 8 bits.
        devices: how many devices train.
        trainer: settings of the Trainer that the trained stages share, such as `strategy` and `precision`.
        seed: seed of the data and of every training stage.
        synthesize: settings of `synthesize`, for embedded data; demonstrations and comparisons are then those.
        sft: settings of SFT.
        reward: settings of the reward model.
        ppo: settings of PPO.
        generate: settings of `generate`.
        margins: settings of `margins`.
        report: settings of `report`.
        size: what the report calls the size of the model; by default the name of the run folder. It replaces `{size}`
            in `run_dir`, `model` and names of files.
        config_dir: folder of the files that sections name.
        redo: stages to run again, with all that is made from them; what they made before is moved aside.
        check: train nothing; check every setting and file, try one update of each stage, and write nothing.
        overrides: section -> settings by dotted key; on a command line `--ppo.KEY VALUE`.

    Returns:
        What was made.
    """
    model, config_dir = model and find_shipped(model), find_shipped(config_dir)  # as on a command line
    every = {"trainer": trainer or {}} if devices is None else {"trainer": {**(trainer or {}), "devices": devices}}
    shared = Shared(
        model, demonstrations, comparisons, prompts, validation, validation_seed, reward_model, reward_function, judge,
        text or {}, response_length, pad_token, eos_tokens, learning_rate, best, lora, quantization, **every,
    )  # fmt: skip
    sections = {
        "synthesize": synthesize, "sft": sft, "reward": reward, "ppo": ppo, "generate": generate, "margins": margins,
        "report": report,
    }  # fmt: skip
    stage_processes.warm_up()
    size = size or Path(run_dir).name
    recipe = Recipe(shared, sections, overrides, size)
    run = run_dir.replace("{size}", size)
    return run_stages(recipe.stages(), run, config_dir, seed, redo=redo or (), base=str(recipe.model), check=check)


def run_stages(
    stages: Sequence[Stage],
    run_dir: str,
    config_dir: str = ".",
    seed: Seed | None = None,
    arguments: Sequence[str] = (),
    redo: Sequence[str] = (),
    base: str | None = None,
    check: bool = False,
) -> Result:
    """Runs stages one after another, each in its own process, and hands their exports on.

    Args:
        stages: what to run, in order.
        run_dir: folder of the whole run.
        config_dir: folder of the configs of the stages.
        seed: seed of the data and of every training stage; it overrides the one in the config.
        arguments: further arguments for the command line of every training stage.
        redo: stages to run again.
        base: the model that the first stage starts from, with which all stages are checked first; None: no check.
        check: check the stages, and try one update of each, instead of running them.
    """
    run, started = Path(run_dir), time.monotonic()
    with (
        Runner(run, Path(config_dir), seed, arguments, redo=redo, writes=not check) as runner,
        stage_processes.forwarded_signals(),
    ):
        again = set() if check else runner.made_again(stages)
        left = [stage for stage in stages if check or stage.name in again or not runner.check(stage)]
        if base is not None and any(stage.command == "fit" for stage in left):
            _preflight(left, runner, base)
        runner.move_aside(stages, again)
        if check:
            try_stages(stages, runner, str(base))
            return _result(run, stages)
        for number, stage in enumerate(stages, 1):
            runner.run_stage(stage, f"[{number}/{len(stages)}]")
            if stage.command == "fit" and stage in left:
                _report_so_far(run)
        runner.finish()
    result = _result(run, stages)
    print(f"Pipeline finished in {time.monotonic() - started:.0f} s: {run}")
    if result.report:
        print(f"Report:  {result.report}\nCurves:  tensorboard --logdir {run}")
    for finding in result.findings:
        print(f"Finding: {finding}")
    return result


def _report_so_far(run: Path) -> None:
    """Writes the report of what there is, to look at while the next stage runs."""
    ended = stage_processes.run(["report", "--runs", str(run), "--output", str(run)], Path(os.devnull))
    if not ended.status:
        print(f"Report so far: {run / 'report.html'}\n", flush=True)


def _preflight(stages: Sequence[Stage], runner: Runner, base: str) -> None:
    """Refuses to start if anything is wrong with any stage."""
    print("Checking the settings and files of all stages ...", flush=True)
    jobs = [(stage.name, runner.words(stage)) for stage in stages]
    stand_ins = {}
    for stage in stages:
        place = runner.place(stage)
        if stage.command == "fit" and not files.is_complete(place / files.EXPORT):
            stand_ins[str(place / files.EXPORT)] = "" if "{run}" in base else base
        elif stage.command in (*TABLES, "synthesize") and not place.exists():
            stand_ins[str(place)] = ""
    if found := complaints(jobs, stand_ins):
        head = f"{len(found)} problems; nothing was started:" if len(found) > 1 else "nothing was started:"
        raise UserError("\n  ".join([head, *found]))


def _result(run: Path, stages: Sequence[Stage]) -> Result:
    page, summary = run / "report.html", run / "report" / "summary.csv"
    exports = {stage.name: run / stage.name / files.EXPORT for stage in stages if stage.command == "fit"}
    found = pd.read_csv(summary) if summary.exists() else None
    return Result(run, exports, page if page.exists() else None, found, all_findings(run))
