"""A run that is killed, on one or several processes, in any stage, goes on to the bits of a run that never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.callbacks.checkpoint_io import read
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import comparisons, demonstrations

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "OMP_NUM_THREADS": "1",
}
PROCESSES = {
    "one": ["--trainer.devices=1"],
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "zero2": ["--trainer.devices=2", "--trainer.strategy=zero2"],
}
GROUPS = [
    f"--model.ppo.{setting}"
    for setting in (
        "advantage=leave_one_out",
        "samples_per_prompt=2",
        "critic_warmup=0",
        "kl_target=null",
        "kl_in=loss",
        "kl_estimator=k3",
    )
]
NOT_COMPARED = ("seconds", "memory", "eps", "tokens_per")
Driver = Callable[[list[str], int, Path], list[int]]
Fit = Callable[..., list[int]]


def happens(event: str, hook: str, number: int, rank: int | None = None) -> list[str]:
    at = "--trainer.callbacks"
    words = [f"{at}+=resume_callbacks.Happens", f"{at}.event={event}", f"{at}.hook={hook}", f"{at}.number={number}"]
    return words if rank is None else [*words, f"{at}.rank={rank}"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> dict[str, list[str]]:
    """What each stage takes."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, rows in {"d": demonstrations(24, 1, "train"), "c": comparisons(24, 1, "train", 0)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = folder / "reward"
    ScalarModel.from_policy(model_path, seed=3).save(reward, load_tokenizer(model_path))
    texts, pairs = str(folder / "d.jsonl"), str(folder / "c.jsonl")

    def data(train: str) -> list[str]:
        parts = [(split, key) for split in ("train", "validation") for key in ("path", "split")]
        values = {"path": train, "split": "train"}
        return [f"--data.{split}.{key}={values[key]}" for split, key in parts]

    ppo = ["response_length=4", "ppo_epochs=2", "critic_warmup=2", "kl_target=0.1"]
    return {
        "sft": [*data(texts), "--model.response_length=4"],
        "reward": [*data(pairs), f"--data.demonstrations.path={texts}"],
        "dpo": data(pairs),
        "ppo": [*data(texts), f"--model.reward_path={reward}", *(f"--model.ppo.{setting}" for setting in ppo)],
    }


@pytest.fixture
def fit(driver: Driver, inputs: dict[str, list[str]], model_path: str, tmp_path: Path) -> Fit:
    """Trains a stage in `tmp_path / name` with a checkpoint after every step; returns the exit statuses."""

    def fit(stage: str, processes: str, name: str, *words: str) -> list[int]:
        last = "--trainer.callbacks+=rlhf.callbacks.last_checkpoint.LastCheckpoint"
        callbacks = [last, "--trainer.callbacks.every_n_steps=1"]
        stage, _, kind = stage.partition(" ")
        words = (*words, *{"": (), "adapters": ("--model.lora.rank=4",), "groups": GROUPS}[kind])
        if stage == "ppo":
            callbacks += ["--trainer.callbacks+=Export", "--trainer.callbacks.best=validation/score"]
        settings = {
            "run_dir": tmp_path / name, "model.model_path": model_path, "data.batch_size": 8,
            "data.micro_batch_size": 2, "data.eval_batch_size": 4, "trainer.accelerator": "cpu",
            "trainer.log_every_n_steps": 1, "trainer.max_epochs": 3 if stage == "ppo" else 2,
            "trainer.check_val_every_n_epoch": 1, "trainer.limit_val_batches": 1,
        }  # fmt: skip
        return driver(
            [
                "fit", f"--config={ROOT}/configs/quickstart/{stage}.yaml", *inputs[stage],
                *(f"--{key}={value}" for key, value in settings.items()), *PROCESSES[processes], *callbacks, *words,
            ],
            1 if processes == "one" else 2, tmp_path / f"{name}.log",
        )  # fmt: skip

    return fit


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "export").rglob("*.safetensors"))
    tensors = {f"{f.parent.name}/{name}": t for f in files for name, t in load_file(f).items()}
    for file in (run / "export").rglob("*config.json"):
        tensors[f"{file.parent.name}/shift"] = torch.tensor(json.loads(file.read_text()).get("reward_shift", 0.0))
    return tensors


def curves(run: Path) -> dict[str, dict[int, float]]:
    found = read_curves(run)
    return {name: dict(found[name].items()) for name in sorted(found) if not name.startswith(NOT_COMPARED)}


def assert_same(run: Path, whole: Path) -> None:
    expected, found = weights(whole), weights(run)
    assert expected.keys() == found.keys()
    assert len(expected) > 10
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert curves(run) == curves(whole)
    assert (run / "curves.jsonl").read_text().count("\n") == (whole / "curves.jsonl").read_text().count("\n")
    assert len(curves(run)) > 5


def assert_exported(driver: Driver, run: Path, folder: Path) -> None:
    """The command `export` makes of the last checkpoint, by whatever processes, the export of the run and a card."""
    words = ["export", f"--checkpoint={run}/checkpoints/last.ckpt", f"--output={folder}"]
    assert driver(words, 1, folder.with_suffix(".log")) == [0], folder.with_suffix(".log").read_text()[-3000:]
    found = contents(folder)
    assert found.pop("README.md")
    assert found == contents(run / "export")


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


MIDDLE = ("on_train_batch_start", 6)  # of an optimizer step, of an epoch, of an update
EARLY = ("on_train_batch_start", 4)


@pytest.mark.parametrize(
    ("stage", "processes", "event"),
    [
        ("reward", "one", happens("kill", *MIDDLE)),
        ("ppo", "one", happens("kill", "on_train_batch_start", 13)),
        ("reward", "ddp", happens("terminate", *EARLY, rank=1)),
        ("ppo", "ddp", [*happens("full_disk", *MIDDLE, rank=0), *happens("kill", "on_train_batch_start", 11)]),
        ("sft", "ddp", happens("kill_while_writing", *MIDDLE)),
        ("dpo", "zero2", happens("terminate", *EARLY, rank=0)),
        ("reward", "zero2", [*happens("full_disk_at_last", *EARLY, rank=0), *happens("kill_while_writing", *MIDDLE)]),
        ("ppo", "zero2", [*happens("full_disk", *MIDDLE, rank=1), *happens("kill", "on_train_batch_start", 11)]),
        ("ppo groups", "zero2", happens("kill", "on_train_batch_start", 11)),
        ("ppo adapters", "zero2", happens("kill_while_writing", *MIDDLE)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    fit: Fit, driver: Driver, tmp_path: Path, stage: str, processes: str, event: list[str]
) -> None:
    assert set(fit(stage, processes, "whole")) == {0}, (tmp_path / "whole.log").read_text()[-3000:]
    stopped = fit(stage, processes, "run", *event)
    log = tmp_path / "run.log"
    if "terminate" in str(event):
        assert stopped == [143, 0]
        assert "Stopped by SIGTERM after step 2. Resume from " in log.read_text()
    else:
        assert -signal.SIGKILL in stopped
    assert not (tmp_path / "run" / "export").exists()
    assert set(fit(stage, processes, "run", "--ckpt_path=last")) == {0}, log.read_text()[-3000:]
    assert ("could not be written" in log.read_text()) == ("full_disk" in str(event))
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert_exported(driver, tmp_path / "run", tmp_path / "exported")
    if stage.startswith("ppo"):  # the resumed run knew which was the best
        assert contents(tmp_path / "run" / "export_best") == contents(tmp_path / "whole" / "export_best")
    if (stage, processes) == ("reward", "one"):  # nothing is left to train
        assert fit(stage, processes, "run", "--ckpt_path=last") == [0]
        assert_same(tmp_path / "run", tmp_path / "whole")


def test_parts_of_zero_become_weights_from_which_any_number_of_processes_goes_on(fit: Fit, tmp_path: Path) -> None:
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    assert fit("ppo", "zero2", "run", *happens("kill", "on_train_epoch_start", 2)) == [-9, -9]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    converted = tmp_path / "weights.ckpt"
    convert_zero_checkpoint_to_fp32_state_dict(str(last), str(converted))
    assert fit("ppo", "one", "run", f"--ckpt_path={last}") == [2]
    assert "written with ZeRO, and trainer.strategy is now one without" in (tmp_path / "run.log").read_text()
    assert fit("ppo", "one", "run", f"--ckpt_path={converted}") == [0]
    assert read_curves(tmp_path / "run")["episode"].tolist() == [8, 16, 24]
    rates = read_curves(tmp_path / "run")["lr"]
    assert rates.tolist() == pytest.approx([rates[8] * share for share in (1, 2 / 3, 1 / 3)])
    assert last.is_file()


def test_a_stopped_pipeline_saves_what_runs(inputs: dict[str, list[str]], model_path: str, tmp_path: Path) -> None:
    words = [f"--model.model_path={model_path}", *inputs["sft"], "--trainer.accelerator=cpu", "--data.batch_size=8"]
    small = ["--data.micro_batch_size=2", "--trainer.max_epochs=9", *PROCESSES["ddp"]]
    own = [f"--sft.{word[2:]}" for word in (*words, *small, *happens("terminate_pipeline", *EARLY, rank=0))]
    file = next(word.partition("=")[2] for word in words if word.startswith("--data.train.path="))
    command = [
        sys.executable, str(ROOT / "train.py"), "pipeline", f"--config_dir={ROOT}/configs/quickstart",
        '--sft={"config": "sft.yaml"}', "--reward=false", "--ppo=false", f"--model={model_path}", "--validation=0.3",
        f"--demonstrations={file}", f"--run_dir={tmp_path}/run", *own,
    ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-3000:]
    last = tmp_path / "run" / "sft" / "checkpoints" / "last.ckpt"
    assert f"Stopped by SIGTERM after step 2. Resume from {last} with --ckpt_path last." in done.stdout
    assert done.stdout.endswith("Stopped by SIGTERM; the same command resumes.\n")
    assert read(last)["global_step"] == 2
