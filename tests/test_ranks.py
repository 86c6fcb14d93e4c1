"""Several processes on this machine: DDP and ZeRO-2 give what one process gives.

SFT under ZeRO-2 is started as a user starts it, all else by the driver, which need not import anything.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import comparisons, demonstrations

ROOT = Path(__file__).parent.parent
PROCESSES = {
    "one": ["--trainer.devices=1"],
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "zero2": ["--trainer.devices=2", "--trainer.strategy=zero2"],
    "zero2_offload": ["--trainer.devices=2", "--trainer.strategy=zero2_offload"],
}
SMOOTH = "--model.optimization.eps=1e-3"  # a small one makes a large step of the rounding of a tiny gradient
CLIP = 5.0  # of a norm of 6.4: were the loss divided twice, nothing would be clipped
CLIPPED = ["--model=ranks_modules.SGDModule", f"--trainer.gradient_clip_val={CLIP}"]
ONE_STEP = ["--model=ranks_modules.FixedResponsesPPO", "--model.ppo.ppo_epochs=1", "--trainer.max_epochs=1"]
GROUPS = [
    "--model=ranks_modules.FixedGroupsPPO", "--model.ppo.samples_per_prompt=2", "--model.ppo.advantage=leave_one_out",
    "--model.ppo.kl_in=loss", "--model.ppo.kl_estimator=k3",
]  # fmt: skip
WARM_UP = ["--model.ppo.critic_warmup=1", "--trainer.max_epochs=2"]
IN_BFLOAT16 = ["--model=ranks_modules.WaitingPPO", "--trainer.precision=bf16-mixed", "--model.ppo.ppo_epochs=2"]
AS_A_USER = "sft-zero2"
Driver = Callable[[list[str], int, Path], list[int]]
Fit = Callable[..., Path]


def train_py(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="session")
def fit(tmp_path_factory: pytest.TempPathFactory, worker_id: str, model_path: str, driver: Driver) -> Fit:
    """Fits a stage of a pipeline on one global batch, once for all tests that ask for it; returns its run folder."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "ranks"
    folder.mkdir(exist_ok=True)
    records = {"demonstrations": demonstrations(8, 1, "train"), "comparisons": comparisons(8, 1, "train", 0)}
    data = {name: folder / f"{name}-{worker_id}.jsonl" for name in records}
    for name, file in data.items():
        file.write_text("".join(json.dumps(r) + "\n" for r in records[name]))

    def run_once(name: str, stage: str, *words: str, base: Path | str = model_path) -> Path:
        run = folder / name
        train = data["comparisons" if stage in ("reward", "dpo") else "demonstrations"]
        with FileLock(f"{run}.lock"):
            if not (run / "export").exists():
                command = [
                    "fit", f"--config={ROOT}/configs/quickstart/{stage}.yaml", f"--run_dir={run}",
                    f"--model.model_path={base}", f"--data.train.path={train}", f"--data.validation.path={train}",
                    "--data.validation.split=train", "--data.batch_size=8", "--data.micro_batch_size=2",
                    "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", SMOOTH, *words,
                ]  # fmt: skip
                start(name, command)
        return run

    def start(name: str, command: list[str]) -> None:
        if name == AS_A_USER:
            done = train_py(*command)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            number, log = 1 if "--trainer.devices=1" in command else 2, folder / f"{name}.log"
            assert set(driver(command, number, log)) == {0}, log.read_text()[-3000:]

    def fit(kind: str, processes: str, *words: str, name: str | None = None) -> Path:
        name, words = name or f"{kind}-{processes}", (*PROCESSES[processes], *words)
        if kind in ("sft", "clipped"):
            return run_once(name, "sft", "--model.response_length=6", *(CLIPPED if kind == "clipped" else []), *words)
        sft = fit("sft", "zero2") / "export"
        if kind == "dpo":
            return run_once(name, "dpo", *words, base=sft)
        if kind == "reward":
            words = (f"--data.demonstrations.path={data['demonstrations']}", *words)
            return run_once(name, "reward", *words, base=sft)
        words = (
            f"--model.reward_path={fit('reward', 'zero2')}/export", "--model.ppo.response_length=6",
            "--model.ppo.critic_warmup=0", "--trainer.check_val_every_n_epoch=1", *words,
        )  # fmt: skip
        return run_once(name, "ppo", *(ONE_STEP if kind == "ppo" else []), *words, base=sft)

    return fit


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "export").rglob("*.safetensors"))
    tensors = {f"{f.parent.name}/{name}": t for f in files for name, t in load_file(f).items()}
    for file in (run / "export").rglob("*config.json"):
        tensors[f"{file.parent.name}/shift"] = torch.tensor(json.loads(file.read_text()).get("reward_shift", 0.0))
    return tensors


def assert_same_weights(one: Path, two: Path) -> None:
    expected, found = weights(one), weights(two)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=0, msg=name)


def assert_same_step(one: Path, two: Path) -> None:
    """Weights and the norm of the gradient are the same after one optimizer step."""
    assert_same_weights(one, two)
    norms = [read_curves(run)["grad_norm"].tolist() for run in (one, two)]
    assert len(norms[0]) == 1
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("processes", ["ddp", "zero2"])
def test_sft_gives_the_same_weights_on_one_and_on_two_processes(fit: Fit, processes: str) -> None:
    assert_same_step(fit("sft", "one"), fit("sft", processes))


@pytest.mark.parametrize("processes", ["ddp", "zero2", "zero2_offload"])
def test_gradients_and_their_clipping_are_the_same_on_two_processes(fit: Fit, processes: str) -> None:
    one = fit("clipped", "one")
    assert read_curves(one)["grad_norm"].iloc[0] > CLIP
    assert_same_step(one, fit("clipped", processes))


@pytest.mark.parametrize("processes", ["ddp", "zero2"])
@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
def test_the_later_stages_give_the_same_weights_on_two_processes(fit: Fit, stage: str, processes: str) -> None:
    assert_same_step(fit(stage, "one"), fit(stage, processes))


@pytest.mark.parametrize("processes", ["ddp", "zero2"])
def test_a_policy_without_a_critic_gets_the_same_weights_on_two_processes(fit: Fit, processes: str) -> None:
    one, two = (fit("ppo", p, *GROUPS, name=f"groups-{p}") for p in ("one", processes))
    assert not any(name.startswith("critic") for name in weights(one))
    assert_same_step(one, two)


@pytest.mark.parametrize(("processes", "bits"), [("ddp", "null"), ("zero2", "null"), ("zero2", "int8")])
def test_adapters_get_the_same_weights_on_two_processes(fit: Fit, processes: str, bits: str) -> None:
    words = ("--model.lora.rank=4", f"--model.quantization={bits}")
    one, two = (fit("ppo", p, *words, name=f"adapters-{bits}-{p}") for p in ("one", processes))
    assert any("lora_B" in name and tensor.any() for name, tensor in weights(one).items())
    assert_same_step(one, two)


@pytest.mark.parametrize("processes", ["ddp", "zero2"])
def test_the_first_step_after_the_warm_up_is_the_same_on_two_processes(fit: Fit, processes: str) -> None:
    """A step of the critic, then one of both; were the first one counted, the policy's would be 0.74 as large."""
    words = [*WARM_UP, "--trainer.gradient_clip_val=0.1"]
    assert_same_weights(*(fit("ppo", p, *words, name=f"warm-{p}") for p in ("one", processes)))


def test_a_pipeline_under_zero2(fit: Fit) -> None:
    sft, reward, ppo = (fit(stage, "zero2") for stage in ("sft", "reward", "ppo"))
    load = {"output_loading_info": True, "dtype": torch.float32}
    for folder in (sft / "export", ppo / "export"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, **load)
        assert not report["missing_keys"] | report["unexpected_keys"]
    for folder in (reward / "export", ppo / "export" / "critic"):
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, **load)
        assert not report["missing_keys"] | report["unexpected_keys"]
        assert model.config.num_labels == 1
    curves = read_curves(ppo)
    assert curves["val/ratio_max_deviation"].max() < 1e-5
    assert curves["objective/kl"].iloc[0] == pytest.approx(0, abs=1e-4)
    for run, curve, count in ((sft, "loss", 1), (reward, "accuracy", 1), (ppo, "score", 2)):  # PPO's start, too
        assert len(read_curves(run)[f"validation/{curve}"]) == count


@pytest.fixture(scope="session")
def in_bfloat16(fit: Fit) -> Path:
    """Two updates of PPO in bfloat16, the first of the critic alone, with a checkpoint after each."""
    keep = {"dirpath": None, "filename": "{epoch}", "save_top_k": -1, "save_on_train_epoch_end": True}
    checkpoints = json.dumps([{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}])
    return fit("bf16", "zero2", *IN_BFLOAT16, *WARM_UP, f"--trainer.callbacks={checkpoints}")


def test_ppo_on_two_processes(in_bfloat16: Path) -> None:
    curves = read_curves(in_bfloat16)
    assert curves["episode"].tolist() == [8, 16]
    assert curves["val/ratio_max_deviation"].max() < 2e-3
    assert curves["invariants/first_kl"].tolist() == [0]
    assert curves["invariants/ranks"].max() == 0
    expected = curves["objective/scores"] + curves["objective/non_score_reward"]
    assert curves["objective/rlhf_reward"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert (curves["val/num_eos_tokens"] / 8).tolist() == pytest.approx(curves["rollout/eos_share"].tolist())


def test_an_export_has_the_float32_weights_that_the_optimizer_steps(in_bfloat16: Path) -> None:
    for name, tensor in weights(in_bfloat16).items():
        assert tensor.dtype == torch.float32
        assert tensor.ndim < 2 or not torch.equal(tensor, tensor.bfloat16().float()), name


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(fit: Fit, in_bfloat16: Path) -> None:
    stopped = in_bfloat16.with_name("bf16-resumed")
    if not stopped.exists():
        (first,) = in_bfloat16.rglob("epoch=0.ckpt")
        shutil.copytree(first, stopped / "checkpoints" / "last.ckpt")
    resumed = fit("bf16", "zero2", *IN_BFLOAT16, *WARM_UP, "--ckpt_path=last", name="bf16-resumed")
    expected, found = weights(in_bfloat16), weights(resumed)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    expected_curves, curves = read_curves(in_bfloat16), read_curves(resumed)
    for name in ("objective/kl", "objective/scores", "loss/policy_avg", "grad_norm", "lr", "validation/score"):
        assert curves[name].tolist() == expected_curves[name].loc[curves[name].index].tolist(), name
