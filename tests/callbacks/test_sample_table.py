from __future__ import annotations

from rlhf.callbacks.sample_table import SampleTable


def test_markdown_and_console(capsys: object) -> None:
    table = SampleTable()
    table._samples = [{"query": "a|b\nc", "response": " r", "reference": " t", "score": 1.234}]
    assert table.markdown().splitlines()[2] == "| a\\|b<br>c |  r |  t | 1.23 |"
    table.print()
    assert "1.23" in capsys.readouterr().out  # type: ignore[attr-defined]
