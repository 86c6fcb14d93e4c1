"""The precision of models outside of a Trainer: that of the weights, one setting of one meaning, recorded resolved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rlhf.cli.main import main
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.evaluation.margins import margins
from rlhf.evaluation.reward_scorer import RewardScorer
from rlhf.hardware import weights_precision

TEXTS = ["a b", "c", "d e"], [" d", " e f g", ""]


@pytest.fixture
def seen() -> Iterator[set[str]]:
    """The precisions of all matrices that are used."""
    found = set()

    def note(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Linear):
            found.add(str(module.weight.dtype).removeprefix("torch."))

    hook = register_module_forward_pre_hook(note)
    yield found
    hook.remove()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that computes in bfloat16, as far as `auto` looks; the models stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)


def test_auto_is_float32_on_a_cpu() -> None:
    assert [weights_precision(name) for name in ("auto", "float32", "bfloat16")] == ["float32", "float32", "bfloat16"]


def test_auto_is_bfloat16_on_a_gpu(gpu: None) -> None:
    assert [weights_precision(name) for name in ("auto", "float32", "bfloat16")] == ["bfloat16", "float32", "bfloat16"]


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("command", ["generate", "margins", "RewardJudge", "LocalJudge"])
def test_weights_have_the_precision_that_is_recorded(
    command: str, wanted: str, model_path: str, reward_path: str, comparison_file: str, demonstration_file: str,
    tmp_path: Path, seen: set[str],
) -> None:  # fmt: skip
    words = [command, f"--precision={wanted}"]
    if command == "generate":
        words += [f"--model={model_path}", f"--reward={reward_path}", f"--data.path={demonstration_file}"]
        words += ["--response_length=2"]
    elif command == "margins":
        words += [f"--reward={reward_path}", f"--data.path={comparison_file}"]
    else:
        model = reward_path if command == "RewardJudge" else model_path
        for side, text in (("a", "one"), ("b", "two words")):
            (tmp_path / f"{side}.csv").write_text(f"query,response\nq,{text}\n")
        words = ["judge", f"--a.table={tmp_path}/a.csv", f"--b.table={tmp_path}/b.csv", f"--judge={command}"]
        words += [f"--judge.model={model}", f"--judge.precision={wanted}"]
        words += ["--judge.template={query} {first} {second}"] * (command == "LocalJudge")
    main([*words, f"--output={tmp_path}/t.csv"])
    assert seen == {wanted}
    settings = json.loads((tmp_path / "t.csv.json").read_text())["settings"]
    assert settings.get("judge", settings)["precision"] == wanted


def test_a_table_is_not_continued_in_another_precision(
    reward_path: str, comparison_file: str, tmp_path: Path, gpu: None
) -> None:
    table, source = f"{tmp_path}/m.csv", Source(comparison_file)
    margins(table, reward_path, source, precision="bfloat16")
    margins(table, reward_path, source)  # `auto` is the same on this machine
    with pytest.raises(UserError, match='precision: "bfloat16" before, "float32" now'):
        margins(table, reward_path, source, precision="float32")


def test_rewards_of_bfloat16_weights_are_near_and_float32(reward_path: str) -> None:
    exact, rounded = (torch.tensor(RewardScorer(reward_path, precision=p)(*TEXTS)) for p in ("float32", "bfloat16"))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, atol=0.1 * exact.std().item(), rtol=0)
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the head is applied in float32
