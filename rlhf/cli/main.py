"""The command line: `fit`, `validate`, `test`, `predict` for one stage, and verbs for everything around it."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.cli.parsing import parse
from rlhf.errors import UserError, find_user_error

if TYPE_CHECKING:
    from rlhf.cli.stage import StageCLI

STAGE_VERBS = {
    "fit": "train one stage: SFT, reward model or PPO",
    "check": "try one update of a stage and show what can be known of the run; exit status 1 when something is wrong",
    "validate": "measure a stage on its validation data",
    "test": "measure a stage on its test data",
    "predict": "write samples or scores to a file",
}
VERBS = {
    "pipeline": ("rlhf.studies.pipeline", "pipeline", "run stages one after another, skipping those that are finished"),
    "synthesize": ("rlhf.synthetic.synthesize", "synthesize", "write the embedded data and a small model"),
    "generate": ("rlhf.evaluation.generate", "generate", "write the responses of a policy to every query of a split"),
    "judge": ("rlhf.evaluation.pairwise", "judge", "ask a judge which of two responses to each query is better"),
    "margins": ("rlhf.evaluation.margins", "margins", "write the reward model's margin of every comparison"),
    "report": (
        "rlhf.report.report",
        "report",
        "write report.md, figures and numbers of runs over sizes and seeds, from judged tables",
    ),
    "scaling": ("rlhf.studies.scaling", "scaling", "run stages for model sizes and seeds, and one report of all"),
    "ablate": ("rlhf.studies.ablation", "ablate", "run PPO with small changes, plot each against the default"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `python train.py` and of `rlhf`.

    Args:
        args: the words of the command line; by default those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    sys.path.insert(0, os.getcwd())  # so that --model my_package.MyPPO works from anywhere
    _quiet()
    try:
        if not words or words[0] in ("-h", "--help"):
            print(overview())
        elif words[0] in VERBS:
            module, function, _ = VERBS[words[0]]
            _call(getattr(importlib.import_module(module), function), words[0], words[1:])
        elif words[0] in STAGE_VERBS:
            stage_cli(words)
        else:
            raise UserError(f"unknown command {words[0]!r}; choose one of {', '.join([*STAGE_VERBS, *VERBS])}.")
    except KeyboardInterrupt:
        print("stopped; the run can go on: see --ckpt_path, or start the same pipeline again", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        user_error = find_user_error(error) or _explain(error)
        if user_error is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {user_error}", file=sys.stderr)
        sys.exit(1 if words[0] == "check" else 2)


def _explain(error: Exception) -> object | None:
    """What to say of an error that is not ours but the user's to mend."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}. Make room; a training run goes on from its last checkpoint with --ckpt_path last."
    return error if type(error).__name__ == "MisconfigurationException" else None


def stage_cli(words: list[str]) -> StageCLI:
    """Run one of the verbs of a stage."""
    from rlhf.cli.stage import StageCLI

    return StageCLI.run(words)


def overview() -> str:
    """Returns the top-level help."""
    verbs = {**STAGE_VERBS, **{name: text for name, (_, _, text) in VERBS.items()}}
    lines = [f"  {name:<12}{text}" for name, text in verbs.items()]
    return "\n".join(["usage: python train.py COMMAND [--help] [--config FILE.yaml] [--KEY VALUE ...]", "", *lines])


def _call(function: Callable[..., Any], verb: str, words: list[str]) -> None:
    """Call a function with arguments from the command line and YAML; its docstring is the help."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=f"train.py {verb}", exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    parser.add_function_arguments(function, fail_untyped=False)
    config = parse(parser, words)
    config.pop("config", None)
    function(**vars(parser.instantiate_classes(config)))


def _quiet() -> None:
    """Leave out what libraries say that no user can act on."""
    for text in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LeafSpec.*",
        ".*infer the batch indices fetched from your dataloader.*",
        r".*module\(s\) in eval mode at the start of training.*",
        ".*Total length of `list` across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", text)
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning.addFilter(lambda record: "Tip:" not in record.getMessage())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "False")  # asks the hub even for local files
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
