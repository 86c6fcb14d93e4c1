"""Policies with a tokenizer of the Llama-2 kind, and reward models with another one, through whole stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig

from rlhf import Export, PPOModule, PPOSettings, RolloutDataModule, SFTDataModule, SFTModule
from rlhf.callbacks.invariants import Invariants
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.errors import UserError
from rlhf.evaluation import generate as module
from rlhf.evaluation.generate import generate
from rlhf.evaluation.reward_scorer import RewardScorer
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import encode, eos_ids, load_tokenizer
from rlhf.models.translated import TranslatedModel

SETTINGS = PPOSettings(response_length=6, ppo_epochs=1)
NEWLINE = "<0x0A>"
MANY = ["</s>", *(f"<0x{byte:02X}>" for byte in range(0, 256, 3))]  # so that about half of the responses end


@pytest.fixture
def prompts(write_jsonl: Callable[..., str]) -> str:
    words = ["my", "sister", "is", "a", "teacher", "in", "town"]
    rows = ({"prompt": " ".join(words[: 1 + n % 7]), "completion": f" {words[n % 5]}."} for n in range(16))
    return write_jsonl("prompts.jsonl", rows)


@pytest.fixture
def rollouts(prompts: str) -> RolloutDataModule:
    return RolloutDataModule(Source(prompts), batch_size=8, micro_batch_size=4, rollout_batch_size=4)


@pytest.fixture
def llama_reward_path(llama_path: str, tmp_path: Path) -> str:
    ScalarModel.from_policy(llama_path, seed=3).save(tmp_path / "llama-reward", load_tokenizer(llama_path))
    return str(tmp_path / "llama-reward")


def by_reward_model(path: str, texts: list[str], ended: list[bool]) -> list[float]:
    """Computes the rewards of texts one by one; those that ended have EOS."""
    model, tokenizer = ScalarModel.from_pretrained(path, "x"), load_tokenizer(path)
    rewards = []
    for text, end in zip(texts, ended, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], *[tokenizer.eos_token_id] * end]])
        with torch.no_grad():
            rewards.append(model.score(ids, torch.ones_like(ids)).item())
    return rewards


def test_ppo_with_a_reward_model_that_has_another_tokenizer(
    llama_path: str, reward_path: str, trainer: Any, rollouts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        ppo = PPOModule(llama_path, reward_path, ppo=SETTINGS, eos_tokens=MANY)
    assert "another tokenizer than the policy" in caplog.text
    checks = Invariants(**dict.fromkeys(("ratio", "first_kl", "first_value", "padding_side", "kl"), "error"))
    trainer(callbacks=[Export(), checks]).fit(ppo, datamodule=rollouts)
    assert "first_value" not in checks.findings  # the critic starts from the policy
    assert "padding_side" in checks.findings
    seen = rollouts.last_rollout
    ended = seen.has_eos.tolist()
    assert 0 < sum(ended) < len(ended)
    expected = by_reward_model(reward_path, [x["query"] + x["response"] for x in seen.texts], ended)
    expected = [reward if end else -1.0 for reward, end in zip(expected, ended, strict=True)]  # the EOS trick
    assert seen.scores.tolist() == pytest.approx(expected, abs=1e-4)
    critic = ppo.actor_critic.critic.model
    assert type(critic).__name__ == "LlamaForSequenceClassification"


def test_a_text_that_is_too_long_for_the_reward_model_is_said(llama_path: str, reward_path: str) -> None:
    source, target = load_tokenizer(llama_path), load_tokenizer(reward_path)
    model = TranslatedModel(ScalarModel.from_pretrained(reward_path, "x"), source, target)
    ids = torch.tensor([source("q " * 600)["input_ids"]])
    with pytest.raises(UserError, match=r"in the tokens of model\.reward_path has \d+ tokens, more than the 512"):
        model.score(ids, torch.ones_like(ids))


@pytest.mark.parametrize("other", [False, True])
def test_a_table_has_the_texts_and_scores_of_the_tokens_that_were_sampled(
    llama_path: str, llama_reward_path: str, reward_path: str, prompts: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, other: bool,
) -> None:  # fmt: skip
    sample, seen = module.sample, []

    def listens(model: Any, queries: Any, mask: Any, *rest: Any) -> Any:
        tokens = sample(model, queries, mask, *rest)
        rows = zip(queries, mask.bool(), tokens.tolist(), strict=True)
        seen.extend((query[kept].tolist(), own) for query, kept, own in rows)
        return tokens

    monkeypatch.setattr(module, "sample", listens)
    reward = reward_path if other else llama_reward_path
    settings = {"response_length": 6, "temperature": 1.0, "eos_tokens": MANY}
    table = generate(str(tmp_path / "t.csv"), llama_path, Source(prompts), reward=reward, **settings)
    assert 0 < table["has_eos"].sum() < len(table)
    tokenizer = load_tokenizer(llama_path, eos_tokens=settings["eos_tokens"])
    model = ScalarModel.from_pretrained(reward, "x")
    for row, (query, tokens) in zip(table.itertuples(), seen, strict=True):
        tokens = tokens[: row.tokens]
        body = tokens[: row.tokens - row.has_eos]
        assert row.query + row.response == tokenizer.decode(query + body, skip_special_tokens=True)
        if other:
            expected = by_reward_model(reward, [row.query + row.response], [row.has_eos])[0]
        else:
            ids = torch.tensor([query + tokens])
            with torch.no_grad():
                expected = model.score(ids, torch.ones_like(ids)).item()
        assert row.score == pytest.approx(expected, abs=1e-4)
        assert row.reference_score == pytest.approx(
            by_reward_model(reward, [row.query + row.reference], [True])[0], abs=1e-4
        )


def test_eos_tokens_of_sft_reach_ppo_by_the_export(llama_path: str, prompts: str, trainer: Any, tmp_path: Path) -> None:
    data = SFTDataModule(Source(prompts), batch_size=8, micro_batch_size=8)
    trainer(callbacks=[Export()]).fit(SFTModule(llama_path, eos_tokens=["<s>", NEWLINE]), datamodule=data)
    export = str(tmp_path / "run" / "export")
    assert data.splits["train"]["input_ids"][0][-1] == 1  # <s>, the first one
    tokenizer = PPOModule(export, reward_function=lambda q, r, records: [0.0] * len(q)).tokenizer
    assert eos_ids(tokenizer) == (1, tokenizer.convert_tokens_to_ids(NEWLINE))
    assert json.loads(Path(export, "config.json").read_text())["eos_token_id"] == [*eos_ids(tokenizer)]


def test_a_reward_model_that_pads_with_eos_scores(model_path: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    ScalarModel.from_policy(model_path, 1).save(tmp_path / "r", tokenizer)
    expected = RewardScorer(str(tmp_path / "r"))(["a b", "c"], [" d", ""])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "r")
    assert RewardScorer(str(tmp_path / "r"))(["a b", "c"], [" d", ""]) == expected


def test_a_token_without_a_row_is_named_before_the_training(
    llama_tokenizer: Any, from_config: Callable[..., Any], prompts: str, trainer: Any, tmp_path: Path
) -> None:
    rows = len(llama_tokenizer) - 150
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    from_config(LlamaConfig(vocab_size=rows, **shape)).save_pretrained(tmp_path / "base")
    llama_tokenizer.save_pretrained(tmp_path / "base")
    data = SFTDataModule(Source(prompts), batch_size=8, micro_batch_size=8)
    with pytest.raises(UserError, match=rf"data\.train holds the token '.*' with id \d+, but .* has {rows} rows"):
        trainer().fit(SFTModule(str(tmp_path / "base"), pad_token="<unk>"), datamodule=data)


def test_conversations_need_the_tokenizer_of_the_policy(
    llama_path: str, reward_path: str, write_jsonl: Callable[..., str], trainer: Any, tmp_path: Path
) -> None:
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    source = Source(write_jsonl("talk.jsonl", [{"messages": talk}] * 8))
    text = TextFormat(chat_template="{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    data = RolloutDataModule(source, batch_size=8, micro_batch_size=4, text=text)
    with pytest.raises(UserError, match=r"model\.reward_path: the reward model has another tokenizer"):
        trainer().fit(PPOModule(llama_path, reward_path, ppo=SETTINGS), datamodule=data)
    with pytest.raises(UserError, match="reward: the reward model has another tokenizer"):
        generate(str(tmp_path / "t.csv"), llama_path, source, text, reward=reward_path)


def test_a_tokenizer_of_bytes_without_a_fast_backend(
    from_config: Callable[..., Any], prompts: str, trainer: Any, tmp_path: Path
) -> None:
    tokenizer = ByT5Tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    from_config(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = SFTDataModule(Source(prompts), Source(prompts), batch_size=8, micro_batch_size=8)
    module = SFTModule(str(tmp_path / "base"), response_length=4)
    assert (module.tokenizer.pad_token, module.tokenizer.eos_token) == ("<pad>", "</s>")
    run = trainer(callbacks=[Export()])
    run.fit(module, datamodule=data)
    row = data.splits["train"][1]
    assert bytes(n - 3 for n in row["input_ids"][:-1]).decode() == row["query"] + row["reference"]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    again = load_tokenizer(str(tmp_path / "run" / "export"))
    assert encode(again, "é") == encode(tokenizer, "é") == [0xC3 + 3, 0xA9 + 3]
