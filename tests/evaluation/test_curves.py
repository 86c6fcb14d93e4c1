from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from rlhf import run_folder
from rlhf.errors import UserError
from rlhf.evaluation.curves import read_curves


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    for steps, value in (((1, 2, 3), 1.0), ((3, 4), 2.0)):
        logger = TensorBoardLogger(tmp_path, name="", version=run_folder.CURVES)
        for step in steps:
            logger.log_metrics({"score": value}, step)
        logger.finalize("success")
    curve = read_curves(tmp_path)["score"]
    assert curve.to_dict() == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished run"):
        read_curves(tmp_path)
