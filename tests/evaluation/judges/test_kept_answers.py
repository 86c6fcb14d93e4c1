"""Answers in a file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.evaluation.judges.kept_answers import AnswerFile, Entry


def test_answers_are_found_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    answers = AnswerFile(file)
    assert answers.of("a") == []
    entries = [Entry(None, "caf\u00e9\u2028\nx", 1, 2), Entry("tie", "t")]
    for entry in entries:
        answers.append("a", entry)
    answers.append("b", Entry("first"))
    for known in (answers, AnswerFile(file)):
        assert known.of("a") == entries
        assert known.of("b") == [Entry("first")]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_costs_nothing_else(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "answers.jsonl"
    answers = AnswerFile(file)
    answers.append("a", Entry("first"))
    answers.append("b", Entry("second"))
    file.write_bytes(file.read_bytes()[:-cut])
    AnswerFile(file).append("c", Entry("tie"))
    known = AnswerFile(file)
    assert known.of("a") == [Entry("first")]
    assert known.of("b") == ([Entry("second")] if cut == 1 else [])
    assert known.of("c") == [Entry("tie")]


def test_many_threads_and_two_runs_share_a_file(tmp_path: Path) -> None:
    runs = [AnswerFile(tmp_path / "answers.jsonl") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        for number in range(200):
            pool.submit(runs[number % 2].append, str(number), Entry("first", "x" * 500))
    known = AnswerFile(tmp_path / "answers.jsonl")
    assert all(known.of(str(number)) == [Entry("first", "x" * 500)] for number in range(200))
