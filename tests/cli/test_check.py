"""`check` as a user types it: what it shows, what it calls wrong, and that it writes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.cli.check import _pinned_rows
from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.hardware import GIB
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.modules import PPOModule

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(
    tmp_path: Path, model_path: str, demonstration_file: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Check:  # fmt: skip
    """Checks a quickstart config on a tiny model; returns the exit status and what was printed, without line breaks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")

    def check(stage: str, *words: str) -> tuple[int, str]:
        sizes = ["--data.batch_size=8", "--data.micro_batch_size=4", "--data.eval_batch_size=4"]
        given = [f"--model.model_path={model_path}", "--trainer.accelerator=cpu", "--trainer.devices=1", *sizes]
        status = 0
        try:
            main(["check", f"--config={CONFIGS}/{stage}.yaml", "--run_dir=run", *given, *words])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, " ".join(capsys.readouterr().out.split())

    return check


@pytest.fixture
def ppo_words(demonstration_file: str, reward_path: str, model_path: str) -> list[str]:
    """What a check of PPO needs besides."""
    data = [f"--data.{split}={{path: {demonstration_file}}}" for split in ("train", "validation")]
    small = ["--data.rollout_batch_size=4", "--model.ppo.response_length=6", "--model.ppo.critic_warmup=0"]
    return [*data, *small, f"--model.reward_path={reward_path}"]


def centre(reward_path: str, demonstration_file: str) -> None:
    """Shift the reward model so that the demonstrations have mean 0."""
    from rlhf.data.sources import Source
    from rlhf.data.texts import TextFormat
    from rlhf.data.tokenising import load_demonstrations

    tokenizer = load_tokenizer(reward_path)
    rows = load_demonstrations(Source(demonstration_file), "data.train", tokenizer, TextFormat())["input_ids"][:]
    model = ScalarModel.from_pretrained(reward_path, "reward")
    with torch.no_grad():
        scores = [model.score(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)) for ids in rows]
        model.bias -= torch.cat(scores).mean()
    model.save(Path(reward_path), tokenizer)


def test_a_sound_ppo_config(
    check: Check, ppo_words: list[str], reward_path: str, demonstration_file: str, tmp_path: Path
) -> None:
    centre(reward_path, demonstration_file)
    status, shown = check("ppo", *ppo_words)
    assert status == 0, shown
    for text in (
        "EOS │ '<|endoftext|>', id 0", "[PAD]", "rows for", "32 rows", "8 = 1 processes x 2 micro-batches x 4",
        "ratio (D33)", "first_kl (D24)", "padding_side (D20)", "demonstration_reward (D21)", "responses with EOS",
        "estimated", "for 32 updates", "one update │ done",
    ):  # fmt: skip
        assert text in shown, text
    assert not (tmp_path / "run").exists()


def test_a_run_that_would_learn_nothing_deserves_a_look(
    check: Check, ppo_words: list[str], reward_path: str, demonstration_file: str
) -> None:
    """Random responses of six tokens do not end, so that the EOS trick gives all of them the same score."""
    centre(reward_path, demonstration_file)
    status, shown = check("ppo", *ppo_words, "--model.optimization.learning_rate=1e-9")
    assert status == 0, shown
    assert re.search(r"learning rate │ 1\.0e-09; usual for [\d,]+ parameters: about 1\.\de-03 │ look", shown)
    assert re.search(r"score │ -1\.000, std 0\.000 │ look", shown)
    assert "look: The learning rate 1.0e-09 is low for a model of " in shown
    assert "look: The scores of the last 8 episodes are all equal (-1.000 in update 1)." in shown
    _, sound = check("ppo", *ppo_words, "--model.ppo.missing_eos=subtract")
    assert re.search(r"learning rate │ 5\.0e-04; [^│]+ │ ok", sound)
    assert re.search(r"score │ [^│]+ │ ok", sound)
    assert "look: " not in sound


def test_adapters_are_told_from_the_whole_model(
    check: Check, ppo_words: list[str], model_path: str, reward_path: str, demonstration_file: str
) -> None:
    centre(reward_path, demonstration_file)
    adapters = ["--model.lora.rank=4", "--model.lora.export=both", "--model.optimization.learning_rate=1e-2"]
    status, shown = check("ppo", *ppo_words, *adapters)
    assert status == 0, shown
    assert re.search(r"trained │ [\d,]+ parameters, \d+\.\d\d% of all; exported: both", shown)
    for text in (model_path, reward_path, "stored as it is; 2 bases in memory", "usual for adapters on"):
        assert text in shown, text


def memory_shown(shown: str) -> float:
    found = re.search(r"estimated\D+([\d.]+)", shown)
    assert found, shown
    return float(found[1])


def test_models_in_pinned_memory_are_counted_for_all_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a GPU has them."""
    monkeypatch.setattr("rlhf.cli.check.device_memory", lambda device, processes: 32 * GIB)
    assert not list(_pinned_rows(0, 8))
    ((_, _, text, verdict),) = _pinned_rows(3 * GIB, 8)
    assert (text, verdict) == ("24.00 GiB of 32 GiB for placement cpu (8 x 3.00 GiB)", "ok")
    ((_, _, text, verdict),) = _pinned_rows(4 * GIB, 8)
    assert verdict == "look"
    assert "zero3" in text


def test_a_token_budget_is_shown_with_its_memory(
    check: Check, ppo_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, small = check("ppo", *ppo_words, "--data.max_tokens_per_micro_batch=250")
    assert "8 = 1 processes x " in small
    assert "micro-batches of at most 250 tokens" in small
    _, auto = check("ppo", *ppo_words, "--data.max_tokens_per_micro_batch=auto")
    budget = re.search(r"8 = 1 processes x 1 micro-batches of at most (\d+) tokens", auto)
    assert budget, auto
    assert int(budget[1]) > 250
    assert memory_shown(auto) > memory_shown(small)
    monkeypatch.setattr("rlhf.data.token_budget.device_memory", lambda device, processes: 1000)
    status, refused = check("ppo", *ppo_words, "--data.max_tokens_per_micro_batch=auto")
    assert status == 1
    assert "max_tokens_per_micro_batch auto: by the estimate" in refused


@pytest.mark.parametrize(
    "callback",
    [
        "rlhf.callbacks.export.Export",
        "rlhf.callbacks.last_checkpoint.LastCheckpoint",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.callbacks.LearningRateMonitor",
    ],
)
def test_callbacks_of_the_config_write_nothing(
    callback: str, check: Check, demonstration_file: str, tmp_path: Path
) -> None:
    data = [f"--data.{split}={{path: {demonstration_file}}}" for split in ("train", "validation")]
    before = sorted(tmp_path.iterdir())
    status, shown = check("sft", *data, "--model.response_length=4", f"--trainer.callbacks={callback}")
    assert status == 0, shown
    assert sorted(tmp_path.iterdir()) == before


def test_a_batch_that_does_not_divide(check: Check, demonstration_file: str) -> None:
    data = [f"--data.{split}={{path: {demonstration_file}}}" for split in ("train", "validation")]
    status, shown = check("sft", *data, "--data.micro_batch_size=3")
    assert status == 1
    assert "data.micro_batch_size" in shown
    assert "batch size │ 8 =" not in shown


def test_min_epochs_make_it_no_longer(check: Check, demonstration_file: str) -> None:
    data = [f"--data.{split}={{path: {demonstration_file}}}" for split in ("train", "validation")]
    words = ["--model.response_length=4", "--trainer.min_epochs=3", "--trainer.max_epochs=3"]
    status, shown = check("sft", *data, *words)
    assert status == 0
    assert "for 12 steps" in shown


def test_a_reward_model_that_is_not_centred_is_wrong(check: Check, ppo_words: list[str], reward_path: str) -> None:
    model = ScalarModel.from_pretrained(reward_path, "reward")
    model.bias.data.fill_(9.0)
    model.save(Path(reward_path), load_tokenizer(reward_path))
    status, shown = check("ppo", *ppo_words)
    assert status == 1
    assert "wrong: Invariant demonstration_reward (D21)" in shown
    assert "one update │ done" in shown  # a finding does not stop the check


def test_a_run_that_can_not_start_is_wrong(check: Check, ppo_words: list[str]) -> None:
    status, shown = check("ppo", *ppo_words, "--data.batch_size=64")
    assert status == 1
    assert "data.batch_size 64 is larger than the 32 prompts" in shown
    assert "EOS" in shown


def test_a_wrong_word_ends_with_status_1(check: Check) -> None:
    assert check("ppo", "--model.no_such_setting=1")[0] == 1


class OutOfMemory(PPOModule):
    """Its first step does not fit."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_what_does_not_fit_into_memory(check: Check, ppo_words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.modules.PPOModule.training_step", OutOfMemory.training_step)
    status, shown = check("ppo", *ppo_words)
    assert status == 1
    assert "lower data.micro_batch_size" in shown


def test_a_sound_sft_config(check: Check, demonstration_file: str) -> None:
    data = [f"--data.{split}={{path: {demonstration_file}}}" for split in ("train", "validation")]
    status, shown = check("sft", *data, "--model.response_length=4", "--data.text.max_response_length=12")
    assert status == 0, shown
    assert "for 4 steps" in shown
    assert re.search(r"train: responses cut off │ [1-9]\d* \([0-9.]+%\) │ look", shown)
    assert "reward model and critic │ their class is from transformers │ ok" in shown


def test_sft_is_told_what_no_later_stage_can_do(
    check: Check, demonstration_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any) -> bool:
        raise UserError("so only SFT works")

    monkeypatch.setattr("rlhf.cli.check.register_classifier", refuse)
    data = [f"--data.{split}={{path: {demonstration_file}}}" for split in ("train", "validation")]
    status, shown = check("sft", *data, "--model.response_length=4")
    assert status == 0
    assert "reward model and critic │ so only SFT works │ look" in shown


def test_a_sound_reward_config(check: Check, comparison_file: str, demonstration_file: str) -> None:
    words = [f"--data.{split}={{path: {comparison_file}}}" for split in ("train", "validation")]
    status, shown = check("reward", *words, f"--data.demonstrations={{path: {demonstration_file}}}")
    assert status == 0, shown
    assert "padding_side (D20)" in shown
    assert "for 3 steps" in shown


def test_odd_records_are_counted(check: Check, write_jsonl: Callable[..., str]) -> None:
    records = [{"prompt": f"Name {n} <|endoftext|> now{' ' * (n > 2)}", "completion": "Tim"} for n in range(16)]
    file = write_jsonl("odd.jsonl", records)
    data = [f"--data.{split}={{path: {file}}}" for split in ("train", "validation")]
    status, shown = check("sft", *data, "--model.response_length=4")
    assert status == 0, shown
    for text in (
        "train: prompts meet their responses without any blank │ 3 (18.8%) │ look",
        "train: records hold special tokens in their texts │ 16 (100.0%) │ look",
        "validation: records of train │ 16 (100.0%) │ look",
    ):
        assert text in shown, text


def test_tokens_that_deserve_a_look(
    check: Check, llama_path: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """A configuration that names another EOS than the tokenizer, and PAD that is BOS."""
    folder = shutil.copytree(llama_path, tmp_path / "base")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 13}))
    prompts = write_jsonl("p.jsonl", [{"prompt": f"number {n}", "completion": " one."} for n in range(24)])
    words = [f"--data.{split}={{path: {prompts}}}" for split in ("train", "validation")]
    words += [f"--model.model_path={folder}", "--model.pad_token=<s>", "--model.response_length=4"]
    status, shown = check("sft", *words)
    assert status == 0, shown
    assert f"EOS │ '</s>', id 2; but the configuration of {folder} names '<0x0A>', id 13 │ look" in shown
    assert "PAD │ '<s>', id 1; it is BOS, too │ look" in shown
    _, shown = check("sft", *words, "--model.eos_tokens=['</s>', '<0x0A>']", "--model.resize_embeddings=true")
    assert "EOS │ '</s>', id 2; '<0x0A>', id 13 │ ok" in shown
