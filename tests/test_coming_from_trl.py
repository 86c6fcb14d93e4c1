"""docs/coming-from-trl.md is complete and true, and folders that TRL's trainers write are taken as they are."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_details import MISSING, default, in_backticks
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl_fields import PPO_CONFIG, PPO_TRAINER

from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm
from rlhf.models.scalar_model import ScalarModel

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from-trl.md").read_text()
OF_THE_COMMAND = {"run_dir", "ckpt_path"}
TEXTS = ["A post of some words\nTL;DR: what it says", "Another\nTL;DR: short"]


def rows(heading: str) -> list[list[str]]:
    """The rows of the table below a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize(("heading", "names"), [("PPOConfig", PPO_CONFIG), ("PPOTrainer", PPO_TRAINER)])
def test_every_name_is_in_the_table_once(heading: str, names: list[str]) -> None:
    patterns = [pattern for row in rows(heading) for pattern in in_backticks(row[0])]
    assert len(names) == len(set(names))
    for name in names:
        assert sum(fnmatchcase(name, pattern) for pattern in patterns) == 1, name
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in names), pattern


@pytest.mark.parametrize(("heading", "column"), [("PPOConfig", 2), ("PPOTrainer", 1)])
def test_every_setting_of_the_tables_exists(heading: str, column: int) -> None:
    for row in rows(heading):
        settings = in_backticks(row[column])
        assert settings or row[column] == "none", row
        assert row[-1] or settings, row
        named = re.findall(r"`((?:model|data|trainer)\.[\w.]+)`", row[-1])
        for setting in {*settings, *named} - OF_THE_COMMAND:
            assert default("PPO", setting) != MISSING, setting


def test_every_setting_of_the_commands_exists() -> None:
    settings = re.findall(r"--((?:model|data|trainer)\.[\w.]+)", PAGE)
    assert settings
    for setting in set(settings) - {"data.train.path"}:
        assert default("PPO", setting) != MISSING, setting


def as_trl_writes(model: Any, base: str, folder: Path) -> dict[str, float]:
    """Writes a folder as TRL 1.16.0 leaves `checkpoint-N`, PAD = EOS where the tokenizer has none; scores of texts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # RewardTrainer does so
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.3).to(parameter.dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"of no interest here, and never unpickled")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    with torch.no_grad():
        encoded = {text: tokenizer(text, return_tensors="pt") for text in TEXTS}
        read = {text: model.eval()(**found).logits.flatten()[0].item() for text, found in encoded.items()}
    return read


def classifier(base: str, lora: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    model.config.pad_token_id = None
    return model if lora is None else get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora))


@pytest.fixture(params=["gpt_neox", "llama"])
def base(request: pytest.FixtureRequest, model_path: str, llama_path: str) -> str:
    return {"gpt_neox": model_path, "llama": llama_path}[request.param]


WITH_HEAD = [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}, {"task_type": "SEQ_CLS", "lora_dropout": 0.1}]


@pytest.mark.parametrize("lora", [None, *WITH_HEAD])
def test_a_reward_model_scores_as_in_transformers(base: str, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    expected = as_trl_writes(classifier(base, lora), base, tmp_path)
    model, tokenizer = ScalarModel.from_pretrained(str(tmp_path), "reward"), AutoTokenizer.from_pretrained(base)
    for text, score in expected.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert model.score(ids, torch.ones_like(ids)).item() == pytest.approx(score, abs=1e-5)
    assert len({round(score, 3) for score in expected.values()}) == 2


def test_stored_bfloat16_is_computed_in_float32(llama_path: str, tmp_path: Path) -> None:
    as_trl_writes(classifier(llama_path, None, torch.bfloat16), llama_path, tmp_path)
    model, theirs = ScalarModel.from_pretrained(str(tmp_path), "reward"), classifier(str(tmp_path), None)
    ids = AutoTokenizer.from_pretrained(llama_path)(TEXTS[0], return_tensors="pt")["input_ids"]
    expected = theirs.eval()(ids).logits.item()
    assert model.score(ids, torch.ones_like(ids)).item() == pytest.approx(expected, abs=1e-5)


def test_an_adapter_without_the_head_is_refused(base: str, tmp_path: Path) -> None:
    """`RewardTrainer` with a bare `LoraConfig()` trains a random head that nobody saves."""
    as_trl_writes(classifier(base, {}), base, tmp_path)
    with pytest.raises(UserError, match=r"reward: the adapter .* has no head.*modules_to_save=\[\"score\"\]"):
        ScalarModel.from_pretrained(str(tmp_path), "reward")


def test_a_reward_models_adapter_is_no_policy(base: str, tmp_path: Path) -> None:
    as_trl_writes(classifier(base, {"modules_to_save": ["score"]}), base, tmp_path)
    with pytest.raises(UserError, match="holds a reward model, not a causal language model"):
        load_causal_lm(str(tmp_path))
