"""The command line: `fit`, `check`, `validate`, `test` and `predict` for one stage, and commands for all around it."""

import importlib
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

from rlhf import heartbeat
from rlhf.cli.parsing import add_trust, message_of, parse, split_words, take_trust
from rlhf.errors import UserError, find_user_error, full_disk

STAGE_VERBS = {
    "fit": "train one stage: SFT, reward model or PPO",
    "check": "try one update of a stage (`check pipeline`: of all), show what is known; status 1: something is wrong",
    "validate": "evaluate a stage on its validation data",
    "test": "evaluate a stage on its test data",
    "predict": "write samples or scores to a file",
}
VERBS = {  # each is a function of the same name in a module
    "pipeline": ("rlhf.studies.pipeline", "from a model and data to a report, skipping finished stages"),
    "export": ("rlhf.cli.exporting", "write the model of a checkpoint as a folder, and upload it to the hub"),
    "synthesize": ("rlhf.synthetic.synthesize", "write the embedded data and a small model"),
    "generate": ("rlhf.evaluation.generate", "write the responses of a policy to every query of a split"),
    "judge": ("rlhf.evaluation.pairwise", "ask a judge which of two responses to each query is better"),
    "margins": ("rlhf.evaluation.margins", "write the reward model's margin of every comparison"),
    "report": ("rlhf.report.report", "write one page of runs, finished or not, or of judged tables"),
    "rehearse": ("rlhf.cli.rehearsal", ""),  # for rlhf.studies.preflight only, so the help leaves it out
    "scaling": ("rlhf.studies.scaling", "run stages for several model sizes and seeds, and write one report"),
    "ablate": ("rlhf.studies.ablation", "run PPO with small changes and plot each against the default"),
    "baselines": ("rlhf.studies.baselines", "run several methods over seeds and plot them against the KL to SFT"),
}
IGNORED_WARNINGS = (  # no user can act on them
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*LeafSpec.*",
    ".*infer the batch indices fetched from your dataloader.*",
    r".*module\(s\) in eval mode at the start of training.*",
    ".*Total length of `list` across ranks is zero.*",
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs `python train.py` or `rlhf`.

    Args:
        args: the command line; by default that of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    sys.path.insert(0, os.getcwd())  # so that --model my_package.MyPPO works from anywhere
    _quiet()
    try:
        if not words or words[0] in ("-h", "--help"):
            print(overview())
        elif words[0] in VERBS:
            _call(words[0], words[1:])
        elif words[:2] == ["check", "pipeline"]:
            _call("pipeline", [*words[2:], "--check=true"])
        elif words[0] in STAGE_VERBS:
            if words[1:] and not words[1].startswith("-"):
                wanted = "check pipeline, or settings as --KEY VALUE" if words[0] == "check" else "--KEY VALUE"
                raise UserError(f"{words[0]} {words[1]}: there is no such command; write {wanted}.")
            from rlhf.cli.stage import StageCLI

            StageCLI.run(words)
        else:
            known = [*STAGE_VERBS, *(name for name, (_, text) in VERBS.items() if text)]
            near = "".join(f" Did you mean {name}?" for name in get_close_matches(words[0], known, 1))
            raise UserError(f"unknown command {words[0]!r}; choose one of {', '.join(known)}.{near}")
    except KeyboardInterrupt:
        how = "resume with --ckpt_path last" if words[0] in STAGE_VERBS else "the same command goes on"
        print(f"stopped; {how}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = message_of(error)
        if message is None and not heartbeat.started():
            raise
        status = (find_user_error(error) or UserError).status
        sys.exit(heartbeat.fail(error, message, 1 if message is None or words[0] == "check" else status))
    finally:
        heartbeat.leave()


def overview() -> str:
    """Returns the top-level help."""
    described = {**STAGE_VERBS, **{name: text for name, (_, text) in VERBS.items()}}
    lines = [f"  {name:<12}{text}" for name, text in described.items() if text]
    return "\n".join(["usage: python train.py COMMAND [--help] [--config FILE or NAME] [--KEY VALUE ...]", "", *lines])


def _call(command: str, words: list[str]) -> None:
    """Calls a function with arguments from the command line and YAML; its docstring is the help."""
    function = getattr(importlib.import_module(VERBS[command][0]), command)
    more = {}
    if command == "pipeline":  # settings of its stages are words of their command lines
        from rlhf.studies.recipe import SECTIONS

        words, more["overrides"] = split_words(words, [*SECTIONS, "judge"])
    if command == "report":
        pairs = zip(words, [*words[1:], "--"], strict=False)
        words = ["--watch=true" if word == "--watch" and after.startswith("--") else word for word, after in pairs]
    parser, config = parsed(function, words)
    with own_names():
        function(**vars(parser.instantiate(config)), **more)


def parsed(function: Callable[..., Any], words: list[str]) -> tuple[Any, Any]:
    """Parses the command line of a function; returns the parser and the arguments, of which it makes objects."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=f"train.py {function.__name__}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    parser.add_function_arguments(function, fail_untyped=False, sub_configs=True, skip={"overrides"})
    add_trust(parser)
    config = parse(parser, _with_list(words, "--runs" if function.__name__ == "report" else "--redo"))
    take_trust(config)
    for name in ("config", "trust_remote_code"):
        config.pop(name, None)
    return parser, config


@contextmanager
def own_names() -> Iterator[None]:
    """Gives the settings in errors the names that they have in these commands, not those of a stage."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"\b(data\.(?=text\.)|model\.(?=eos_tokens|pad_token))", "", str(error))) from error


def _with_list(words: list[str], option: str) -> list[str]:
    """Lets several words follow an option, as in `--redo sft reward`, which jsonargparse wants in one."""
    if option not in words:
        return words
    start = words.index(option) + 1
    values = list(takewhile(lambda word: not word.startswith(("-", "[")), words[start:]))
    return [*words[: start - 1], f"{option}={json.dumps(values)}", *words[start + len(values) :]] if values else words


def _tell(failed: threading.ExceptHookArgs) -> None:
    """Shows an error of a thread, unless the disk is full, which the main thread says in a sentence."""
    if failed.exc_value is None or not full_disk(failed.exc_value):
        threading.__excepthook__(failed)


def _quiet() -> None:
    for text in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", text)
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.addFilter(lambda record: not re.search("Tip:|Detected KeyboardInterrupt", record.getMessage()))
    if threading.excepthook is threading.__excepthook__:  # TensorBoard's thread would speak before the main one
        threading.excepthook = _tell
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a process that ends, all others would print a trace
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "False")  # asks the hub even for local files
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
