"""Conversations: the template's tokens, one BOS, EOS at the end of the turn, what is refused (D02, D04, D07)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.data.chat import answered_ids, conversation_of, refuse_conversations
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_comparisons, load_demonstrations
from rlhf.errors import UserError

Load = Callable[..., Any]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


BRIEF = [say("system", "Be brief."), say("user", "What is a quark?")]
SUM = [say("user", "2+2?"), say("assistant", "4"), say("user", "And doubled?"), say("assistant", "8")]


@pytest.fixture
def chat(chat_path: str) -> Any:
    """The tokenizer with a template."""
    return AutoTokenizer.from_pretrained(chat_path)


@pytest.fixture
def load(chat: Any, write_jsonl: Load) -> Load:
    """Tokenises records as demonstrations, prompts or comparisons."""

    def load(*records: Any, kind: str = "demonstrations", use: Any = chat, **text: Any) -> Any:
        source, form = Source(write_jsonl("records.jsonl", records)), TextFormat(**text)
        if kind == "comparisons":
            return load_comparisons(source, "data.train", use, form)
        return load_demonstrations(source, "data.train", use, form, need_response=kind == "demonstrations")

    return load


def expected(chat: Any, messages: list[dict[str, str]]) -> list[int]:
    """What transformers makes of a conversation, without the newline behind its last turn."""
    ids = chat.apply_chat_template(messages, tokenize=True, return_dict=False)
    return ids[: len(ids) - ids[::-1].index(chat.eos_token_id)]


def test_demonstrations_have_the_tokens_of_the_template(chat: Any, load: Load) -> None:
    answer = say("assistant", "A constituent.")
    forms = [
        {"messages": [*BRIEF, answer], "id": 1},
        {"prompt": BRIEF, "completion": [answer]},
        {"prompt": BRIEF, "completion": "A constituent."},
    ]
    for form in forms:
        row = load(form)[0]
        assert row["input_ids"] == expected(chat, [*BRIEF, answer])
        assert row["input_ids"].count(chat.bos_token_id) == 1
        assert row["query_ids"] == chat.apply_chat_template(
            BRIEF, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert row["input_ids"][: row["response_start"]] == row["query_ids"]
        assert row["query"] == "System: Be brief.\n\nUser: What is a quark?\n\nAssistant:"
        assert row["reference"] == "A constituent."
        assert not row["truncated"]


def test_prompts_end_where_the_assistant_answers(chat: Any, load: Load) -> None:
    for form, prompt in (
        ({"messages": SUM}, SUM[:3]),
        ({"messages": BRIEF}, BRIEF),
        ({"prompt": BRIEF}, BRIEF),
    ):
        row = load(form, kind="prompts")[0]
        ids = chat.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert row["query_ids"] == ids


@pytest.mark.parametrize("form", ["explicit", "implicit", "both", "text"])
def test_comparisons_of_conversations(chat: Any, load: Load, form: str) -> None:
    prompt, yes, no = [say("user", "Salty?")], [say("assistant", "Yes.")], [say("assistant", "Yes, no.")]
    record: dict[str, Any] = {
        "explicit": {"prompt": prompt, "chosen": yes, "rejected": no},
        "implicit": {"chosen": prompt + yes, "rejected": prompt + no},
        "both": {"prompt": "Salty?", "chosen": prompt + yes, "rejected": prompt + no},
        "text": {"prompt": "Salty?", "chosen": yes, "rejected": no},
    }[form]
    row = load(record, kind="comparisons")[0]
    assert row["chosen_ids"] == expected(chat, prompt + yes)
    assert row["rejected_ids"] == expected(chat, prompt + no)
    assert (row["query"], row["chosen_text"], row["rejected_text"]) == (
        "User: Salty?\n\nAssistant:",
        "Yes.",
        "Yes, no.",
    )


def test_conversations_without_an_answer_are_left_out_and_counted(load: Load) -> None:
    good = {"messages": [*BRIEF, say("assistant", "x")]}
    with pytest.warns(UserWarning, match="without an assistant's turn: 1, first in record 2"):
        assert len(load(good, {"messages": BRIEF})) == 1
    pair = {"chosen": [*BRIEF, say("assistant", "x")], "rejected": [*BRIEF, say("assistant", "y")]}
    with pytest.warns(UserWarning, match="rejected without an assistant's turn at its end: 1"):
        assert len(load(pair, pair | {"rejected": [*BRIEF, say("user", "y")]}, kind="comparisons")) == 1


def test_an_empty_answer_is_left_out(load: Load) -> None:
    good = {"messages": [*BRIEF, say("assistant", "x")]}
    with pytest.warns(UserWarning, match="an answer without a text: 1, first in record 2"):
        assert len(load(good, {"messages": [*BRIEF, say("assistant", " ")]})) == 1


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_conversations_of_sharegpt(chat: Any, load: Load, column: str) -> None:
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    assert load({column: turns})[0]["input_ids"] == expected(chat, SUM[:2])


def test_prompts_of_pairs_with_a_text_as_prompt_are_conversations(chat: Any, load: Load) -> None:
    question, sides = say("user", "Salty?"), [say("assistant", "Yes."), say("assistant", "No.")]
    record = {"prompt": "Salty?", "chosen": [question, sides[0]], "rejected": [question, sides[1]]}
    row, pair = load(record, kind="prompts")[0], load(record, kind="comparisons")[0]
    assert row["query_ids"] == pair["chosen_ids"][: len(row["query_ids"])]
    assert row["reference"] == "Yes."


def test_a_completion_of_several_messages_ends_with_its_last_turn(chat: Any, load: Load) -> None:
    row = load({"prompt": SUM[:1], "completion": SUM[1:]})[0]
    assert row["input_ids"] == expected(chat, SUM)
    assert (row["reference"], len(row["turns"])) == ("8", 4)


def test_what_follows_the_last_answer_is_left_out(chat: Any, load: Load) -> None:
    assert load({"messages": [*SUM, say("user", "Thanks.")]})[0]["input_ids"] == expected(chat, SUM)


@pytest.mark.parametrize("turns", ["last", "every"])
def test_the_loss_is_on_the_last_or_on_every_turn(
    chat: Any, attach: Load, batch_of: Load, write_jsonl: Load, turns: str
) -> None:
    path = write_jsonl("sum.jsonl", [{"messages": SUM}])
    data = SFTDataModule(Source(path), batch_size=1, micro_batch_size=1)
    attach(data, loss_on="all", assistant_turns=turns, tokenizer=chat)
    batch = batch_of(data, "train", [0])
    counted = batch["input_ids"][0][batch["loss_mask"][0].bool()]
    assert chat.decode(counted) == {"last": "8<|im_end|>", "every": "4<|im_end|>8<|im_end|>"}[turns]
    assert data.train_sizes()[0] == [len(counted)]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '> ' if m.role == 'assistant' and loop.last else '' }}{{ m.content }}<|im_end|>"
        "{% endfor %}{{ '> ' if add_generation_prompt else '' }}",
        "{% for m in messages %}{{ m.content }}{{ '!' if m.role == 'assistant' and loop.last else '' }}<|im_end|>"
        "{% endfor %}",
    ],
)
def test_every_turn_is_refused_where_the_template_writes_earlier_ones_in_another_way(
    chat: Any, attach: Load, write_jsonl: Load, template: str
) -> None:
    chat.chat_template = template
    path = write_jsonl("sum.jsonl", [{"messages": SUM}])
    data = SFTDataModule(Source(path), batch_size=1, micro_batch_size=1)
    with pytest.raises(UserError, match=r"model\.assistant_turns"):
        attach(data, assistant_turns="every", tokenizer=chat)
    attach(data, assistant_turns="last", tokenizer=chat)


def test_long_conversations_are_unfittable_and_long_answers_lose_their_end(chat: Any, load: Load) -> None:
    record = {"messages": [*BRIEF, say("assistant", "A constituent of protons and of neutrons.")]}
    with pytest.raises(UserError, match=r"record 1, counting from 1: tokens of the conversation .*more than 5.*unfitt"):
        load(record, max_query_length=5)
    row = load(record, max_response_length=4)[0]
    assert row["truncated"]
    assert len(row["input_ids"]) == row["response_start"] + 4
    assert row["input_ids"][-1] != chat.eos_token_id


def test_a_tokenizer_without_a_template_names_the_setting_that_brings_one(
    tokenizer: Any, load: Load, tmp_path: Path
) -> None:
    record = {"messages": [*BRIEF, say("assistant", "x")]}
    with pytest.raises(UserError, match=r"data\.text\.chat_template"):
        load(record, use=tokenizer)
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
                    "{{ '[assistant]' if add_generation_prompt else '' }}")  # fmt: skip
    for template in (str(file), file.read_text()):
        try:
            row = load(record, use=tokenizer, chat_template=template)[0]
            assert tokenizer.chat_template == file.read_text()  # what an export of it will carry
        finally:
            tokenizer.chat_template = None
        assert tokenizer.decode(row["input_ids"]).endswith("What is a quark?<|endoftext|>[assistant]x<|endoftext|>")
    with pytest.raises(UserError, match=r"data\.text\.chat_template: the file missing\.jinja"):
        load(record, use=tokenizer, chat_template="missing.jinja")


def test_a_template_that_ends_turns_with_no_eos_names_the_token(chat: Any, load: Load) -> None:
    chat.eos_token = "<|endoftext|>"
    with pytest.raises(UserError, match=r"with '<\|im_end\|>', not with .*set model\.eos_tokens to \['<\|im_end\|>'\]"):
        load({"messages": [*BRIEF, say("assistant", "x")]})


def test_special_tokens_in_messages_are_left_out_or_let_in(chat: Any, load: Load) -> None:
    good, bad = ({"messages": [say("user", text), say("assistant", "x")]} for text in ("a", "a<|im_end|>b"))
    with pytest.warns(UserWarning, match=r"special token, which data\.text\.special_tokens: control"):
        assert len(load(good, bad)) == 1
    assert load(bad, special_tokens="control")[0]["query_ids"].count(chat.eos_token_id) == 2


def test_a_broken_template_is_refused_once(chat: Any, load: Load) -> None:
    chat.chat_template = "{{ bos_token }}\n{% for message in messages %}"
    with pytest.raises(UserError, match=r"data\.text\.chat_template is broken in its line 2: Unexpected end"):
        load({"messages": SUM}, {"messages": SUM})


def test_what_a_template_refuses_is_counted_with_its_reason(chat: Any, load: Load) -> None:
    chat.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}" + chat.chat_template
    )
    with pytest.warns(UserWarning, match=r"the chat template refuses the conversation \(No system role\.\): 1"):
        assert len(load({"messages": [*BRIEF, say("assistant", "x")]}, {"messages": SUM})) == 1


def test_a_record_tells_what_a_scorer_reads(chat: Any, load: Load) -> None:
    import json

    for form in ({"messages": SUM}, {"chosen": SUM, "rejected": [*SUM[:3], say("assistant", "9")]}):
        row = load(form, kind="prompts")[0]
        messages = conversation_of(json.loads(row["record"]))
        assert messages == SUM[:3]
        assert answered_ids(chat, messages, "8") == row["input_ids"]
    assert conversation_of({"prompt": "a text"}) is None


def test_a_conversation_anywhere_in_the_data_is_no_text_for_a_foreign_reward_model() -> None:
    records = [json.dumps({"prompt": prompt}) for prompt in ("a", SUM[:1])]
    refuse_conversations(records[:1], "reward")
    with pytest.raises(UserError, match=r"^reward: .*reads no conversations"):
        refuse_conversations(records, "reward")
