from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from rlhf.callbacks.sample_table import SampleTable


def test_samples_are_shown_in_tensorboard_and_on_the_console(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(logger.experiment, "add_text", lambda name, text, step: texts.append(text))
    trainer: Any = SimpleNamespace(loggers=[logger], global_step=1)
    sample = {"query": "a|b\nc", "response": " r", "reference": " t", "score": 1.234}
    table: Any = SampleTable(rows=1)
    table.on_validation_batch_end(trainer, None, {"samples": [sample, sample]}, None, 0)
    table.on_validation_epoch_end(trainer, None)
    assert texts[0].splitlines() == [
        "| query | response | reference | score |", "| --- | --- | --- | --- |", "| a\\|b<br>c |  r |  t | 1.23 |"
    ]  # fmt: skip
    assert "1.23" in capsys.readouterr().out
