"""Lists of messages from SFT to the judge, with a tiny chat model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rlhf.callbacks.export import Export
from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.evaluation.generate import generate
from rlhf.evaluation.judges.scoring import RewardJudge
from rlhf.evaluation.margins import margins
from rlhf.evaluation.pairwise import Candidate, judge
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules import Optimization, PPOModule, PPOSettings, RewardModule, SFTModule

Make = Callable[..., Any]
WORDS = ["cat", "dog", "fish", "bird", "tree", "sea", "sun", "moon"]
SIZES: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "eval_batch_size": 4}


def asked(word: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Echo."}, {"role": "user", "content": f"Say {word}."}]


def answer(word: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": word}]


def test_sft_reward_ppo_generate_and_judge(chat_path: str, trainer: Make, write_jsonl: Make, tmp_path: Path) -> None:
    chat = AutoTokenizer.from_pretrained(chat_path)
    demos = Source(write_jsonl("demos.jsonl", [{"messages": asked(w) + answer(w)} for w in WORDS]))
    pairs = [{"prompt": asked(w), "chosen": answer(w), "rejected": answer("no " + w)} for w in WORDS]
    comparisons = Source(write_jsonl("pairs.jsonl", pairs))
    prompts = Source(write_jsonl("prompts.jsonl", [{"prompt": asked(w)} for w in WORDS]))

    def fit(stage: str, module: Any, data: Any, epochs: int) -> str:
        root = tmp_path / stage
        run = trainer(callbacks=[Export()], limit_val_batches=0, max_epochs=epochs, default_root_dir=root)
        run.fit(module, datamodule=data)
        metrics[stage] = run.callback_metrics
        return str(root / "export")

    metrics: dict[str, Any] = {}
    fast = Optimization(learning_rate=1e-2)
    sft = fit("sft", SFTModule(chat_path, optimization=fast), SFTDataModule(demos, demos, **SIZES), 30)
    assert AutoTokenizer.from_pretrained(sft).chat_template == chat.chat_template
    start = RewardModule(sft, optimization=Optimization(learning_rate=1e-3))
    reward = fit("reward", start, PreferenceDataModule(comparisons, demonstrations=demos, **SIZES), 4)
    settings = PPOSettings(response_length=6, ppo_epochs=1)
    ppo = fit("ppo", PPOModule(sft, reward, ppo=settings), RolloutDataModule(prompts, **SIZES), 1)
    assert metrics["ppo"]["val/ratio_max_deviation"] < 1e-5
    assert metrics["ppo"]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["ppo"]["rollout/eos_share"] > 0.9  # SFT taught it to end its turn

    table = generate(f"{tmp_path}/ppo.parquet", ppo, demos, response_length=6, reward=reward)
    assert table["query"][0] == "System: Echo.\n\nUser: Say cat.\n\nAssistant:"
    assert table["reference"].tolist() == WORDS
    assert set(table["response"]) <= set(WORDS)  # one turn, without its markup
    assert json.loads(table["record"][0])["prompt"] == asked("cat")
    model = ScalarModel.from_pretrained(reward, "reward")
    chosen, rejected = (
        [score_of(model, chat, asked(w) + answer(said)) for w, said in zip(WORDS, texts, strict=True)]
        for texts in (WORDS, [f"no {w}" for w in WORDS])
    )
    assert table["reference_score"].tolist() == pytest.approx(chosen, abs=1e-4)
    for length in (169, 1):  # margins are of whole responses
        text = TextFormat(max_response_length=length)
        found = margins(f"{tmp_path}/margins-{length}.parquet", reward, comparisons, text)["margin"].tolist()
        assert found == pytest.approx([x - y for x, y in zip(chosen, rejected, strict=True)], abs=1e-4)

    sides = [Candidate(f"{tmp_path}/ppo.parquet"), Candidate(f"{tmp_path}/ppo.parquet", "reference")]
    rewards = RewardJudge(reward)
    rewards.prepare(tmp_path / "answers")
    records = [json.loads(record) for record in table["record"]]
    assert rewards.scores(table["query"].tolist(), WORDS, records) == pytest.approx(chosen, abs=1e-4)
    assert len(judge(f"{tmp_path}/judged.parquet", *sides, rewards)) == len(WORDS)


def score_of(model: Any, chat: Any, messages: list[dict[str, str]]) -> float:
    ids = chat.apply_chat_template(messages, tokenize=True, return_dict=False)[:-1]  # without the newline at the end
    assert ids[-1] == chat.eos_token_id
    return model.score(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)).item()
