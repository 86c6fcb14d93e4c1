"""What speaks against a run stands on top of its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf import files
from rlhf.evaluation.tables import write_table
from rlhf.report.report import report
from rlhf.report.run_findings import all_findings, findings_table, read_findings
from rlhf.report.runs import Run, judged_rows


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Writes the judged tables and stages of a run."""

    def run(ppo: str = "other", ends: float = 1.0, rows: int = 40, seed: int = 1, **stages: dict[str, str]) -> Run:
        paths = {}
        for label, text in (("SFT", "same"), ("PPO", ppo)):
            table = pd.DataFrame({
                "query": [f"q{n}" for n in range(rows)], "a": text, "b": "reference", "a_first": "a", "b_first": "a",
                "outcome": [n % 2 / 1 for n in range(rows)], "a_has_eos": ends, "a_tokens": 5, "b_tokens": 5,
            })  # fmt: skip
            paths[label] = str(tmp_path / f"{label}-{seed}.parquet")
            write_table(table, Path(paths[label]))
        for stage, found in stages.items():
            folder = tmp_path / stage
            folder.mkdir()
            (folder / files.CURVES).write_text("")
            (folder / files.FINDINGS).write_text(json.dumps(found))
        return Run("tiny", None, seed, paths, stages={stage: str(tmp_path / stage) for stage in stages})  # type: ignore[misc]

    return run


def test_the_report_begins_with_them(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = run("same", 0.0, sft={"no_eos": "Hardly any.", "loss": "The loss did not fall."})
    tables = report(str(tmp_path), [lost], samples=0)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Report\n\n## Findings\n\n")
    assert page.index("- **sft:** The loss did not fall.") < page.index("SFT, PPO and the reference")
    names = ["no_eos", "loss", "no_eos", "same_responses"]
    assert tables["findings"]["name"].tolist() == names  # that of SFT is said once
    assert "of PPO ends with EOS: 0 of 40" in page
    assert "the same response to 40 of 40 queries" in page
    assert tables["claims"].set_index("claim").filter(like="PPO", axis=0)["verdict"].eq("does not hold").all()
    summary = json.loads((tmp_path / files.SUMMARY).read_text())
    assert [row["name"] for row in summary["findings"]] == names
    assert [row["policy"] for row in summary["summary"]] == ["SFT", "PPO", "reference"]
    assert "warning: The loss did not fall." in capsys.readouterr().out
    assert [line.split(":")[0] for line in all_findings(tmp_path)] == ["sft"] * 2 + ["judged tables"] * 2


def test_a_sound_run_has_none(run: Any, tmp_path: Path) -> None:
    tables = report(str(tmp_path), [run()], samples=0)
    assert "findings" not in tables
    assert "Findings" not in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / files.SUMMARY).read_text())["findings"] == []
    assert all_findings(tmp_path) == []
    assert read_findings(tmp_path) == {}


def test_too_few_queries_tell_nothing(run: Any) -> None:
    few = run("same", 0.0, rows=30)
    assert findings_table([few], judged_rows([few])).empty


def test_several_runs_are_told_apart(run: Any, tmp_path: Path) -> None:
    report(str(tmp_path), [run("same"), run("same", seed=2), run(seed=3)], samples=0)
    page = (tmp_path / "report.md").read_text()
    assert page.count("- **size tiny, seed 1, judged tables:** PPO and SFT gave the same response") == 1
    assert page.count("- **size tiny, seed 2, judged tables:**") == 1
    assert "seed 3, judged tables" not in page


def test_stages_that_were_moved_aside_say_nothing(run: Any, tmp_path: Path) -> None:
    run(sft={"loss": "The loss did not fall."})
    (tmp_path / "sft").rename(tmp_path / "sft.1")
    assert all_findings(tmp_path) == []
