"""The command line as a user types it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlhf.cli.main import _tell, main
from rlhf.modules import SFTModule
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.synthesize import train_tokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = [f"Question: how many legs have {n} cats?\nAnswer:" for n in range(12)]
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPES: dict[str, Any] = {
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "qwen2": (Qwen2Config, WIDTHS | {"num_key_value_heads": 1}),
}


@pytest.fixture(params=SHAPES)
def own_model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A small random model of a user's own with its own tokenizer: without a row for PAD, and with a PAD of its own.

    tests/models has more types, tests/test_other_tokenizers.py more tokenizers.
    """
    base = train_tokenizer(PROMPTS, 300)
    specials: dict[str, Any] = {"eos_token": "<|endoftext|>"}
    if request.param == "qwen2":
        specials = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, **specials)
    spare = 0 if request.param == "gpt2" else 8
    folder = tmp_path / request.param
    torch.manual_seed(0)
    kind, shape = SHAPES[request.param]
    AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer) + spare, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own_data(write_jsonl: Callable[[str, Iterable[dict[str, Any]]], str]) -> Path:
    """A user's own JSONL files."""
    write_jsonl("demonstrations/train.jsonl", [{"prompt": p, "completion": f" {4 * n}"} for n, p in enumerate(PROMPTS)])
    pairs = [{"prompt": p, "chosen": f" {4 * n}", "rejected": " none at all"} for n, p in enumerate(PROMPTS)]
    return Path(write_jsonl("comparisons/train.jsonl", pairs)).parent.parent


def test_own_model_and_own_files_in_one_command(
    tmp_path: Path, own_model: str, own_data: Path, commands: list[list[str]]
) -> None:
    small = [
        word
        for stage in ("sft", "reward", "ppo")
        for word in (f"--{stage}.data.batch_size=4", f"--{stage}.data.micro_batch_size", "2")
    ]
    main([
        "pipeline", f"--config={ROOT}/configs/custom/pipeline.yaml", f"--model={own_model}",
        f"--run_dir={tmp_path}/runs",
        f"--demonstrations={own_data}/demonstrations/train.jsonl", f"--comparisons={own_data}/comparisons/train.jsonl",
        "--response_length=4", "--validation=0.5", "--trainer.accelerator=cpu", "--sft.model.resize_embeddings=true",
        *small, "--ppo.trainer.max_epochs=1", "--ppo.trainer.check_val_every_n_epoch=1",
    ])  # fmt: skip
    assert [words[0] for words in commands[:6]] == ["rehearse", "fit", "report", "fit", "report", "fit"]
    assert commands[-1][0] == "report"
    for stage in ("sft", "reward", "ppo"):
        folder = tmp_path / "runs" / stage
        assert (folder / "config.yaml").is_file()
        assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "runs" / "report.md").is_file()
    ids = torch.tensor([[5, 6, 7]])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/ppo/export")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs/ppo/export/critic")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs/reward/export")
    for output in (policy(ids).logits, critic(ids).logits - critic.config.reward_shift, reward(ids).logits):
        assert output.isfinite().all()
    curves = read_curves(tmp_path / "runs" / "ppo")
    assert curves["objective/kl"].iloc[0] == pytest.approx(0, abs=1e-4)
    assert curves["val/ratio_max_deviation"].max() < 1e-5
    assert list(curves["objective/scores"].index) == [4]  # the x-axis is the number of episodes
    assert curves["validation/score"].index.tolist() == [4]


@pytest.fixture
def sft_words(tmp_path: Path, model_path: str, own_data: Path) -> list[str]:
    """The words of a small SFT run."""
    return [
        "fit", f"--config={ROOT}/configs/quickstart/sft.yaml", f"--run_dir={tmp_path}/run",
        f"--model.model_path={model_path}", "--model.response_length=4",
        f"--data.train.path={own_data}/demonstrations/train.jsonl", "--data.validation=null",
        "--data.batch_size=4", "--data.micro_batch_size=2",
    ]  # fmt: skip


def test_a_subclass_outside_the_package_by_name(
    tmp_path: Path, model_path: str, own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_package.py").write_text(
        "import torch\nfrom rlhf.modules import PPOModule\n"
        "class MyPPO(PPOModule):\n"
        "    def __init__(self, *args, bonus: float = 1.0, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.bonus = bonus\n"
        "    def score_responses(self, episodes):\n"
        "        return torch.full((len(episodes),), self.bonus)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = [
        "fit", "--model=my_package.MyPPO", f"--model.model_path={model_path}", "--model.bonus=2.5",
        "--model.ppo.response_length=4", "--model.ppo.missing_eos_score=2.5", "--data=RolloutDataModule",
        f"--data.train.path={own_data}/demonstrations/train.jsonl", "--data.batch_size=4", "--data.micro_batch_size=4",
        "--run_dir=run", "--trainer.log_every_n_steps=1",
    ]  # fmt: skip
    main(words)
    assert read_curves(tmp_path / "run")["objective/scores"].iloc[0] == pytest.approx(2.5)


def test_validate_test_and_predict(sft_words: list[str], tmp_path: Path, own_data: Path) -> None:
    words = [*sft_words, f"--data.validation.path={own_data}/demonstrations/train.jsonl"]
    words.remove("--data.validation=null")
    for verb in ("validate", "test", "predict"):
        main([verb, *words[1:]])
    rows = (tmp_path / "run" / "predictions-0.jsonl").read_text().splitlines()
    assert len(rows) == 12


def test_without_data_there_is_nothing_to_measure_on(sft_words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for verb, split in (("validate", "data.validation"), ("test", "data.test or data.validation")):
        sentence = f"error: there is nothing to measure on: set {split}."
        assert refusal([verb, *sft_words[1:]], capsys) == sentence


def test_interrupted_it_names_what_to_resume_from(
    sft_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*sft_words, "--trainer.max_epochs=9", *words])
        assert stop.value.code == 130
        return capsys.readouterr().err

    step = SFTModule.training_step

    def interrupt(module: Any, *args: Any) -> Any:
        if module.trainer.current_epoch == module.trainer.max_epochs - 8:
            raise KeyboardInterrupt
        return step(module, *args)

    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores it from the first Ctrl-C on
    monkeypatch.setattr(SFTModule, "training_step", interrupt)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    try:
        said = interrupted()
        assert f"Stopped by SIGINT. Resume from {last} with --ckpt_path last." in said
        assert "Detected KeyboardInterrupt" not in said
        assert "There is no checkpoint yet." in interrupted(f"--run_dir={tmp_path}/new", "--trainer.max_epochs=8")
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_full_disk_in_a_thread_is_left_to_the_main_one(capsys: pytest.CaptureFixture[str]) -> None:
    for number, shown in ((errno.ENOSPC, False), (errno.EIO, True)):
        error = OSError(number, os.strerror(number))
        _tell(threading.ExceptHookArgs((OSError, error, None, None)))
        assert (os.strerror(number) in capsys.readouterr().err) == shown


def test_a_killed_run_goes_on(sft_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*sft_words, "--trainer.max_epochs=1"])
    main([*sft_words, "--trainer.max_epochs=2", "--ckpt_path=last"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2  # what was typed, not what the checkpoint knew
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2  # both are done
    sentence = refusal([*sft_words, "--trainer.max_epochs=1", "--ckpt_path=last"], capsys)
    assert "error: trainer.max_epochs is 1, but " in sentence
    assert "last.ckpt has 2 epochs (PPO: updates) behind it" in sentence


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in " ".join(lines)
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.nonsense=3"], "'nonsense' is not accepted"),
        (["--model=NoSuchModule"], "no class NoSuchModule"),
        (["--model=no_such_package.Module"], "no_such_package"),
        (["--model.optimization.learning_rate=fast"], "optimization.learning_rate"),
        (["--data.train.pth=x"], "train.pth"),
        (["--model.model_path=nowhere"], "model.model_path: there is no model folder nowhere"),
        (["--data.train.path=nowhere.jsonl"], "data.train: there is no file nowhere.jsonl"),
        (["--data.train.columns={prompt: question}"], "no column 'question'; it has prompt, completion"),
        (["--data.batch_size=5"], "data.batch_size 5 does not divide"),
        (["--trainer.accumulate_grad_batches=3"], "trainer.accumulate_grad_batches"),
        (["--run_dir=/proc/nowhere"], "run_dir"),
        (["--trainer.max_epochs=0"], "trainer.max_epochs is 0: nothing would be trained"),
        (["--trainer.max_steps=0"], "trainer.max_steps is 0: nothing would be trained"),
        (["--ckpt_path=hpc"], "ckpt_path: there is no checkpoint hpc."),
        (["--data.train.part=[0,0.0001]"], "make it larger with data.train.part (of a pipeline: --validation)"),
        (["--trainer.val_check_interval=99", "--data.validation.path={train}"], "trainer: `val_check_interval` (99)"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=nope"],
            "trainer: Early stopping conditioned on metric `nope` which is not available.",
        ),
        (["--data=RolloutDataModule"], "data: RolloutDataModule is for ppo, and SFTModule is for sft"),
        (["--model=RewardModule"], "data: SFTDataModule is for sft, and RewardModule is for reward"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_gets_one_sentence(
    sft_words: list[str], words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = next(word for word in sft_words if word.startswith("--data.train.path=")).partition("=")[2]
    assert sentence in refusal([*sft_words, *(word.replace("{train}", train) for word in words)], capsys)


def test_a_run_is_never_overwritten(sft_words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*sft_words, "--trainer.limit_train_batches=2"])
    assert "already holds a run" in refusal(sft_words, capsys)


@pytest.mark.parametrize("again", [[], ["--ckpt_path=last"]])
def test_a_failed_start_takes_other_settings(
    again: list[str], sft_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended before its first checkpoint is moved aside: no curve of it mixes with those of the next."""
    sft_words.append("--trainer.log_every_n_steps=1")

    def fail(self: SFTModule, *args: Any) -> None:
        if self.global_step == 2:
            raise ZeroDivisionError

    monkeypatch.setattr(SFTModule, "on_train_batch_start", fail)
    with pytest.raises(ZeroDivisionError):
        main(sft_words)
    monkeypatch.undo()
    main([*sft_words, "--trainer.limit_train_batches=2", *again])
    assert (tmp_path / "run" / "export").is_dir()
    assert len(read_curves(tmp_path / "run")["lr"]) == 1
    assert {path.name for path in (tmp_path / "run.1").iterdir()} == {"config.yaml", "curves.jsonl", "tensorboard"}


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'train'" in refusal(["train"], capsys)
    assert "Did you mean judge?" in refusal(["juge"], capsys)
    with pytest.raises(SystemExit):
        main(["check", "pipelin"])
    assert "check pipelin: there is no such command; write check pipeline" in capsys.readouterr().err


def test_a_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    tables = ["--output=j.csv", "--a.table=a.csv", "--b.table=b.csv"]
    assert "Did you mean GoldJudge?" in refusal(["judge", *tables, "--judge=GoldJuge"], capsys)
    run = "--runs=[{size: a, parameters: 3, seed: 1, policies: {a: b}, zzz: 1}]"
    assert "There are size, parameters, seed, policies," in refusal(["report", "--output=r", run], capsys)


def test_help_of_the_script() -> None:
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pipeline" in done.stdout


@pytest.mark.parametrize("words", [["pipeline", "--help"], ["fit", "--help"], ["fit", "--print_config"]])
def test_help_of_a_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(words)
    assert {"pipeline": "--run_dir", "fit": "run_dir"}[words[0]] in capsys.readouterr().out
