"""Curves and tables in the run's own file and in every logger; W&B and MLflow without a network, where installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from rlhf import files
from rlhf.callbacks.curves import CurveLogger, Curves
from rlhf.cli.main import main
from rlhf.report.curve_files import read_curves

ROOT = Path(__file__).parents[2]
Fit = Callable[..., Path]


@pytest.fixture
def fit(tmp_path: Path, model_path: str, demonstration_file: str) -> Fit:
    """A short SFT run with a logger; its folder."""

    def run(*words: str) -> Path:
        data = f"{{'path': '{demonstration_file}', 'split': 'train', 'limit': 8}}"
        main([
            "fit", f"--config={ROOT}/configs/quickstart/sft.yaml", f"--run_dir={tmp_path}/run",
            f"--model.model_path={model_path}", "--model.response_length=2", f"--data.train={data}",
            f"--data.validation={data}", "--data.batch_size=4", "--data.micro_batch_size=4",
            "--trainer.log_every_n_steps=1", *words,
        ])  # fmt: skip
        return tmp_path / "run"

    return run


def test_every_logger_of_a_list_gets_scalars_and_samples_in_the_run_folder(fit: Fit) -> None:
    run = fit("--trainer.logger=[{'class_path': 'CSVLogger'}, {'class_path': 'TensorBoardLogger'}]")
    expected = read_curves(run)["validation/loss"]
    [metrics] = run.glob("lightning_logs/*/metrics.csv")
    rows = pd.read_csv(metrics)[["step", "validation/loss"]].dropna()
    assert rows["step"].tolist() == expected.index.tolist()
    assert rows["validation/loss"].tolist() == pytest.approx(expected.tolist())
    samples = pd.read_csv(metrics.parent / "samples.csv")
    assert list(samples) == ["query", "response", "reference", "score", "step"]
    assert samples["query"].str.startswith("SUBREDDIT").all()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = run.glob("lightning_logs/*/events*")
    found = EventAccumulator(str(events.parent)).Reload()
    assert [point.value for point in found.Scalars("validation/loss")] == pytest.approx(expected.tolist())
    [text] = found.Tensors("samples/text_summary")
    assert b"| query | response | reference | score |" in text.tensor_proto.string_val[0]


def test_curves_are_written_without_a_logger(fit: Fit) -> None:
    run = fit("--trainer.logger=false")
    assert read_curves(run)["loss/sft_step"].index.tolist() == [0, 1]
    assert not (run / "tensorboard").exists()


def test_wandb(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fit("--trainer.logger=WandbLogger")
    try:
        assert wandb.run.summary["validation/loss"] == read_curves(run)["validation/loss"].iloc[-1]
        [file] = run.glob("wandb/offline-run*/files/media/table/samples*")
        table = json.loads(file.read_text())
        assert table["columns"] == ["query", "response", "reference", "score"]
        assert table["data"][0][0].startswith("SUBREDDIT")
    finally:
        wandb.finish()


def test_mlflow(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)  # MLflow keeps artifacts in ./mlruns
    address = f"sqlite:///{tmp_path}/mlflow.db"
    run = fit("--trainer.logger=MLFlowLogger", f"--trainer.logger.tracking_uri={address}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)  # for the artifacts
    client = mlflow.MlflowClient(address)
    [found] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.data.metrics["validation/loss"] == read_curves(run)["validation/loss"].iloc[-1]
    samples = client.load_table(found.info.experiment_id, "samples.json", [found.info.run_id])
    assert samples["query"].str.startswith("SUBREDDIT").all()


def test_a_logger_that_is_not_installed_or_refuses_is_one_sentence(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(SystemExit):
        fit("--trainer.logger=WandbLogger")
    said = capsys.readouterr().err
    assert said.startswith("error: trainer.logger: ")
    assert said.count("\n") == 1


def test_a_resumed_run_continues_its_file_where_the_checkpoint_was(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(loggers=[], default_root_dir=tmp_path, is_global_zero=True)
    before = Curves()
    module = SimpleNamespace(kind="sft", total_schedule_steps=lambda: 9)
    trainer.datamodule = SimpleNamespace(batch_size=4)
    before.setup(trainer, module, "fit")  # type: ignore[arg-type]
    [logger] = trainer.loggers
    assert isinstance(logger, CurveLogger)
    before.on_train_start(trainer, module)  # type: ignore[arg-type]
    logger.log_metrics({"a": 1.0}, 1)
    state = before.state_dict()
    logger.log_metrics({"a": 2.0, "abandoned": 2.0}, 2)
    with logger.file.open("a") as file:
        file.write('{"step": 3, "a')  # a kill
    assert read_curves(tmp_path)["a"].to_dict() == {1: 1.0, 2: 2.0}
    trainer.loggers, resumed = [], Curves()
    resumed.setup(trainer, module, "fit")  # type: ignore[arg-type]
    resumed.load_state_dict(state)
    resumed.on_train_start(trainer, module)  # type: ignore[arg-type]
    trainer.loggers[0].log_metrics({"a": 2.5}, 2)
    found = {name: curve.to_dict() for name, curve in read_curves(tmp_path).items()}
    assert found == {"a": {1: 1.0, 2: 2.5}, f"{files.TOTAL}sft": {0: 9}}
    assert logger.file.read_text().count(files.TOTAL) == 1  # as it was
    module.kind = "ppo"
    resumed.on_train_start(trainer, module)  # type: ignore[arg-type]
    assert read_curves(tmp_path)[f"{files.TOTAL}ppo"].to_dict() == {0: 9 * 4}  # in episodes
