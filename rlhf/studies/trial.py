"""Tries one update of every stage of a pipeline that trains, before there is anything to train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rlhf import files
from rlhf.errors import UserError
from rlhf.studies.processes import stage_processes

if TYPE_CHECKING:
    from rlhf.studies.runner import Runner, Stage

SMALL = 1e-5  # scale of a new head, at which rewards differ, but have a mean of 0 as those of a centred model


def try_stages(stages: Sequence[Stage], runner: Runner, base: str) -> None:
    """Runs `check` for every stage that trains.

    The model that the first stage starts from stands in for policies that do not exist yet, with a new head for a
    reward model, and embedded data are written to a temporary folder.

    Raises:
        UserError: something is wrong with a stage.
    """
    failed = []
    with TemporaryDirectory() as name:
        stand_ins: dict[str, str] = {}
        for stage in stages:
            if stage.command not in ("fit", "synthesize"):
                continue
            words, place = runner.words(stage), runner.place(stage)
            if stage.command == "synthesize":
                if not place.exists():
                    stand_ins[str(place)] = f"{name}/{stage.name}"
                    if stage_processes.run([_replaced(word, stand_ins) for word in words]).status:
                        raise UserError(f"something is wrong with {stage.name}: see above.")
                continue
            print(f"{stage.name}: train.py check", flush=True)
            if stage_processes.run(["check", *(_replaced(word, stand_ins) for word in words[1:])]).status:
                failed.append(stage.name)
            stage_processes.check()
            if not files.is_complete(place / files.EXPORT):
                start = _replaced(base.replace("{run}", str(runner.run)), stand_ins)
                start = stand_ins.get(str(runner.run / "sft" / files.EXPORT), start)
                stand_ins[str(place / files.EXPORT)] = _stand_in(start, Path(name), stage)
    if failed:
        raise UserError(f"something is wrong with {', '.join(failed)}: see above.")


def _replaced(word: str, stand_ins: dict[str, str]) -> str:
    for path, stand_in in stand_ins.items():
        word = word.replace(path, stand_in)
    return word


def _stand_in(base: str, folder: Path, stage: Stage) -> str:
    """Returns the base model, with rows for PAD where SFT adds them, or a reward model made of it."""
    import torch

    from rlhf.models.loading import load_causal_lm
    from rlhf.models.saving import save_pretrained
    from rlhf.models.scalar_model import ScalarModel
    from rlhf.models.tokenizers import load_tokenizer

    resizes = str(stage.settings.get("model.resize_embeddings")).lower() == "true"
    if stage.name != "reward" and not resizes:
        return base
    made = folder / stage.name
    tokenizer = load_tokenizer(base, stage.settings.get("model.pad_token"))
    if stage.name == "reward":
        reward = ScalarModel.from_policy(base, seed=1)
        with torch.no_grad():
            reward.head_weight.mul_(SMALL)
        reward.save(made, tokenizer)
        return str(made)
    model = load_causal_lm(base)
    model.resize_token_embeddings(len(tokenizer))
    save_pretrained(model, tokenizer, made)
    return str(made)
