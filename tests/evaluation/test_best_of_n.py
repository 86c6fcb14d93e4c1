"""Best-of-n keeps what the reward model likes best of the very responses that `generate` draws; log-ratios."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli.main import main
from rlhf.evaluation import generate as module
from rlhf.evaluation import resumable
from rlhf.evaluation.best_of_n import best_of_n
from rlhf.evaluation.statistics import best_of_n_kl
from rlhf.evaluation.tables import read_table
from rlhf.seeding import derive_seed
from rlhf.synthetic.posts import demonstrations


@pytest.fixture
def words(model_path: str, reward_path: str, write_jsonl: Callable[..., str]) -> list[str]:
    data = write_jsonl("validation.jsonl", demonstrations(7, 1, "validation"))
    return ["generate", f"--model={model_path}", f"--data.path={data}", "--response_length=6", "--batch_size=3",
            f"--reward={reward_path}"]  # fmt: skip


@pytest.fixture
def table(words: list[str], tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Runs the command with more words, and reads the table that it writes."""

    def make(name: str, *more: str) -> pd.DataFrame:
        main([*words, f"--output={tmp_path}/{name}", *more])
        return read_table(tmp_path / name, "x")

    return make


def test_the_best_of_the_plain_samples_is_kept(
    table: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sample 0 is the plain one, and sample k the plain one of a command whose rows have the seeds of k."""
    chosen = table("best.parquet", "--best_of=4")
    said = capsys.readouterr().out
    plain = [table("0.parquet", "--temperature=0.7")]
    for k in (1, 2, 3):
        monkeypatch.setattr(module, "derive_seed", lambda *parts, k=k: derive_seed(*parts, k))
        plain.append(table(f"{k}.parquet", "--temperature=0.7"))
    scores = np.array([each["score"] for each in plain])
    best = scores.argmax(0)
    assert len(set(best)) > 1
    assert chosen["response"].tolist() == [plain[k]["response"][row] for row, k in enumerate(best)]
    np.testing.assert_allclose(chosen["score"], scores.max(0), atol=1e-5)
    np.testing.assert_allclose(chosen["mean_score"], scores.mean(0), atol=1e-5)
    assert set(chosen["kl"]) == {best_of_n_kl(4)}
    assert [name for name in chosen if name not in plain[0]] == ["mean_score", "kl"]
    pd.testing.assert_frame_equal(chosen[["query", "record"]], plain[0][["query", "record"]])
    means = f"mean score {scores.max(0).mean():.3f}, of all 4 responses {scores.mean():.3f}"
    assert f"best of 4: {means}; the KL to the policy is at most 0.64 nats per response." in said


def test_of_equals_the_first_is_kept() -> None:
    class Scorer:
        """Rewards by the first token of the response."""

        def score_ids(self, sequences: list[list[int]]) -> list[float]:
            return [float(ids[1] // 10) for ids in sequences]

    def respond(rows: list[Any], sample: int) -> pd.DataFrame:
        return pd.DataFrame({"response_ids": [[(11, 25, 21)[sample]], [(31, 32, 5)[sample]]]})

    rows = [{"query_ids": [0]}, {"query_ids": [0]}]
    chosen = best_of_n(respond, Scorer(), 3)(rows)  # type: ignore[arg-type]
    assert chosen["response_ids"].tolist() == [[25], [31]]
    assert chosen["mean_score"].tolist() == pytest.approx([5 / 3, 2.0])


def test_killed_and_started_again(
    words: list[str], table: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table("whole.parquet", "--best_of=3")
    write, sample, sampled = resumable.write_table, module.sample, []

    def dies(made: pd.DataFrame, path: Path) -> None:
        write(made, path)
        if path.name == "responses-by-3-00001.parquet":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "write_table", dies)
        with pytest.raises(SystemExit):
            table("killed.parquet", "--best_of=3")
    monkeypatch.setattr(module, "sample", lambda *args: sampled.append(1) or sample(*args))
    table("killed.parquet", "--best_of=3")
    assert len(sampled) == 3  # of three parts of three samples each, the last one
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("best_of", [1, 2])
def test_another_n_is_another_table(
    table: Callable[..., Any], capsys: pytest.CaptureFixture[str], best_of: int
) -> None:
    table("t.csv", "--temperature=0.7", f"--best_of={best_of}")
    with pytest.raises(SystemExit):
        table("t.csv", "--temperature=0.7", f"--best_of={3 - best_of}")
    assert "made with other settings (best_of" in capsys.readouterr().err


@torch.no_grad()
def test_log_ratios_are_those_of_the_sampled_tokens(
    table: Callable[..., Any], model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    other = AutoModelForCausalLM.from_pretrained(model_path)
    for weight in other.parameters():
        weight.add_(0.1 * weight.std() * torch.randn_like(weight))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for part in (other, tokenizer):
        part.save_pretrained(tmp_path / "other")
    sampled: list[tuple[list[int], list[int]]] = []
    sample = module.sample

    def listens(model: Any, ids: torch.Tensor, mask: torch.Tensor, *rest: Any) -> Any:
        found = sample(model, ids, mask, *rest)
        sampled.extend((x[m.bool()].tolist(), y.tolist()) for x, m, y in zip(ids, mask, found, strict=True))
        return found

    monkeypatch.setattr(module, "sample", listens)
    ratios = table("t.parquet", "--temperature=0.7", f"--reference={tmp_path}/other")
    policies = [
        AutoModelForCausalLM.from_pretrained(model_path),
        AutoModelForCausalLM.from_pretrained(tmp_path / "other"),
    ]
    for row, (query, response) in zip(ratios.itertuples(), sampled, strict=True):
        ids = torch.tensor([[*query, *response[: row.tokens]]])
        places = torch.arange(len(query) - 1, ids.shape[1] - 1)
        ours, theirs = (
            F.log_softmax(policy(ids).logits[0, places] / 0.7, -1)[range(row.tokens), ids[0, places + 1]].sum()
            for policy in policies
        )
        assert row.kl == pytest.approx((ours - theirs).item(), abs=1e-4)
    assert ratios["kl"].abs().min() > 1e-3
    same = table("same.parquet", "--temperature=0.7", f"--reference={model_path}")
    assert same["kl"].tolist() == [0.0] * 7


def test_the_bound_is_the_kl_where_all_rewards_differ() -> None:
    """Best-of-n of a uniform policy over m responses: rank r is kept with probability (r/m)^n - ((r-1)/m)^n."""
    for n in (1, 2, 4, 64):
        m = 200_000
        ranks = np.arange(m + 1) / m
        p = np.diff(ranks**n)
        p = p[p > 0]
        kl = float((p * np.log(p * m)).sum())
        assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-3)
        assert best_of_n_kl(n) >= kl - 1e-12


def test_with_equal_rewards_the_kl_is_below_the_bound() -> None:
    p = np.array([0.5**4, 1 - 0.5**4])  # two responses of probability 1/2; the best of 4
    assert (p * np.log(2 * p)).sum() < best_of_n_kl(4)


def test_the_table_is_what_sft_learns_from(table: Callable[..., Any], model_path: str, tmp_path: Path) -> None:
    """Rejection sampling as two commands."""
    chosen = table("best.parquet", "--best_of=2")
    main([
        "fit", "--model=SFTModule", "--data=SFTDataModule", f"--model.model_path={model_path}",
        f"--data.train.path={tmp_path}/best.parquet", "--data.train.columns={prompt: query, completion: response}",
        f"--run_dir={tmp_path}/sft", "--trainer.accelerator=cpu", "--data.batch_size=7", "--trainer.max_epochs=1",
        "--data.micro_batch_size=7",
    ])  # fmt: skip
    assert (tmp_path / "sft" / "export" / "rlhf.json").is_file()
    assert json.loads(chosen["record"][0])["facts"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--best_of=0"], "best_of.*greater than 0"),
        (["--best_of=4", "--reward=null"], "best_of is 4: give the reward model"),
        (["--best_of=4", "--reference={model}"], "best_of is 4: .* leave one of the two out"),
        (["--reference=nowhere"], "reference: there is no model folder nowhere"),
        (["--reference={reward}"], "holds a reward model, not a causal language model"),
    ],
)
def test_bad_input(
    words: list[str], more: list[str], sentence: str, model_path: str, reward_path: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filled = [word.format(model=model_path, reward=reward_path) for word in more]
    with pytest.raises(SystemExit):
        main([*words, f"--output={tmp_path}/t.csv", *filled])
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "t.csv.json").exists()
