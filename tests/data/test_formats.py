"""Formats of records: TRL's, own columns, what is odd about them, special tokens in texts (D04)."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.quality import overlap, quality_issues
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_comparisons, load_demonstrations
from rlhf.errors import UserError

BOS = EOS = "<|endoftext|>"
Writer = Callable[[str, Any], str]
Load = Callable[..., Any]
DIALOGUE = "\n\nHuman: Name a tree.\n\nAssistant: An oak.\n\nHuman: A tall one?\n\nAssistant:"


@pytest.fixture
def demos_of(tokenizer: Any, write_jsonl: Writer) -> Load:
    """Tokenises records as demonstrations, or as prompts."""

    def load(*records: Any, prompts: bool = False, use: Any = None, **text: Any) -> Any:
        source = Source(write_jsonl("records.jsonl", records))
        return load_demonstrations(source, "data.train", use or tokenizer, TextFormat(**text), not prompts)

    return load


@pytest.fixture
def pairs_of(tokenizer: Any, write_jsonl: Writer) -> Load:
    """Tokenises records as comparisons."""

    def load(*records: Any, **text: Any) -> Any:
        return load_comparisons(
            Source(write_jsonl("pairs.jsonl", records)), "data.train", tokenizer, TextFormat(**text)
        )

    return load


@pytest.fixture
def llama(tokenizer: Any) -> Any:
    """A tokenizer that puts a BOS of its own in front of every text."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": "<s>"})
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    return own


# ----------------------------------------------------------------------------------------------- pairs without a prompt


def test_the_prompt_of_a_pair_is_what_both_sides_share_up_to_the_last_turn(pairs_of: Load) -> None:
    rows = pairs_of(
        {"chosen": DIALOGUE + " The redwood.", "rejected": DIALOGUE + " A bush."},
        {"chosen": DIALOGUE + " The redwood.", "rejected": DIALOGUE + " The redwood is a tree"},
    )
    assert rows["query"][:] == [DIALOGUE] * 2
    assert rows["chosen_text"][:] == [" The redwood."] * 2
    assert rows["rejected_text"][:] == [" A bush.", " The redwood is a tree"]


def test_pairs_without_a_text_or_that_part_early_are_left_out_and_counted(pairs_of: Load) -> None:
    good = {"chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE + " No."}
    empty = {"chosen": DIALOGUE, "rejected": DIALOGUE + " No."}
    early = {"chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE.replace("tall", "small") + " No."}
    bare = {"chosen": "Yes.", "rejected": "No."}
    with pytest.warns(UserWarning, match="left out 3 of 4") as seen:
        assert len(pairs_of(good, empty, early, bare)) == 1
    text = str(seen[0].message)
    for reason in ("chosen without a text in its last turn: 1, first in record 2", "differ before their last turn: 1",
                   "data.text.last_turn", "count from 1"):  # fmt: skip
        assert reason in text


def test_what_begins_the_last_turn_is_a_setting(pairs_of: Load) -> None:
    row = pairs_of({"chosen": "Q: x A: b", "rejected": "Q: x A: c"}, last_turn="A:")[0]
    assert (row["query"], row["chosen_text"]) == ("Q: x A:", " b")


def test_pairs_without_a_prompt_serve_sft_and_ppo_too(demos_of: Load) -> None:
    pair = {"chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE + " No."}
    for prompts in (False, True):
        row = demos_of(pair, prompts=prompts)[0]
        assert (row["query"], row["reference"]) == (DIALOGUE, " Yes.")


# ---------------------------------------------------------------------------------------------------------- own columns


def test_a_format_makes_prompts_of_own_columns(demos_of: Load) -> None:
    records = [
        {"instruction": "Translate.", "input": "cat", "output": "chat"},
        {"instruction": "Name a colour.", "input": "", "output": "blue"},
        {"instruction": "Name a day.", "output": "Monday"},
    ]
    rows = demos_of(*records, prompt="{instruction}\n{input}\n", completion="{output}")
    assert rows["query"][:] == ["Translate.\ncat\n", "Name a colour.\n\n", "Name a day.\n\n"]
    assert rows["reference"][:] == ["chat", "blue", "Monday"]
    assert demos_of(*records, prompt="{instruction}\n", prompts=True)["query"][0] == "Translate.\n"


def test_a_format_without_a_column_of_the_data_is_refused_or_named(demos_of: Load) -> None:
    with pytest.raises(
        UserError, match=r"data\.text\.prompt: .* none of the columns quest.*it has question, completion"
    ):
        demos_of({"question": "a", "completion": " b"}, prompt="{quest}")
    with pytest.warns(UserWarning, match="has no column context"):
        assert demos_of({"question": "a", "completion": " b"}, prompt="{context}{question}")["query"][:] == ["a"]


def test_lists_of_texts_are_named_joined_or_picked_from(demos_of: Load) -> None:
    record = {"source": ["One.", "Two."], "target": ["First", "Second"]}
    with pytest.raises(UserError, match=r"source is a list of texts; data\.text\.join"):
        demos_of(record, prompt="{source}", completion="{target[0]}")
    row = demos_of(record, prompt="{source}\n", completion="{target[0]}", join=" ")[0]
    assert (row["query"], row["reference"]) == ("One. Two.\n", "First")
    with pytest.raises(UserError, match=r"prompt is a list of texts"):
        demos_of({"prompt": ["One.", "Two."], "completion": " b"})
    assert demos_of({"prompt": ["One.", "Two."], "completion": " b"}, join="\n")["query"][:] == ["One.\nTwo."]


def test_the_columns_of_a_query_are_those_that_its_format_names(demos_of: Load) -> None:
    row = demos_of({"post": "A post.", "summary": "short"}, query="{post}\nTL;DR:")[0]
    assert (row["query"], row["reference"]) == ("A post.\nTL;DR:", " short")
    assert demos_of({"a": "x", "summary": "y"}, query="{a}:")["query"][:] == ["x:"]


@pytest.mark.parametrize(
    ("record", "text", "read"),
    [
        ({"prompt": "a", "completion": " b"}, {"query": "Q: {prompt}"}, "prompt, completion"),
        ({"post": "a", "summary": "b"}, {"query": "{post}", "completion": "{post}"}, "post, summary"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, {"completion": "{chosen}"}, "chosen, rejected"),
    ],
)
def test_a_format_that_nothing_uses_is_named(demos_of: Load, record: Any, text: Any, read: str) -> None:
    name = [*text][-1]
    with pytest.warns(UserWarning, match=rf"data\.text\.{name} is not used for .*its records are read as {read}\."):
        demos_of(record, **text)


def test_a_text_that_a_format_made_of_messages_is_no_conversation(demos_of: Load) -> None:
    record = {"prompt": [{"role": "user", "content": "Hi"}], "completion": " x"}
    row = demos_of(record, prompt="Q: {prompt[0][content]}\nA:")[0]
    assert (row["query"], json.loads(row["record"])["prompt"]) == ("Q: Hi\nA:", "Q: Hi\nA:")


def test_a_bad_record_whose_info_is_a_text_is_left_out(demos_of: Load) -> None:
    with pytest.warns(UserWarning, match="left out 1 of 2"):
        demos_of({"prompt": "a", "completion": " b", "info": "x"}, {"prompt": "", "completion": " b", "info": "y"})


def test_texts_alone_are_demonstrations_from_their_first_token(demos_of: Load, tokenizer: Any, llama: Any) -> None:
    for use, first in ((tokenizer, BOS), (llama, "<s>")):
        row = demos_of({"text": "Once upon a time."}, use=use)[0]
        assert use.decode(row["input_ids"]) == first + "Once upon a time." + EOS
        assert (row["query_ids"], row["response_start"]) == (row["input_ids"][:1], 1)


# -------------------------------------------------------------------------------------------- what is counted and shown


def test_a_separator_stands_between_prompt_and_completion(demos_of: Load, pairs_of: Load) -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 prompts meet .* without any blank; .*data\.text\.separator"):
        rows = demos_of({"prompt": "number 0", "completion": "Tim"}, {"prompt": "number 1", "completion": " Tim"})
    assert rows["glued"][:] == [True, False]
    row = demos_of({"prompt": "number 0", "completion": "Tim"}, separator=" ")[0]
    assert (row["query"], row["reference"], row["glued"]) == ("number 0", " Tim", False)
    pair = pairs_of({"prompt": "number 0", "chosen": "Tim", "rejected": "Tom"}, separator="\n")[0]
    assert (pair["chosen_text"], pair["rejected_text"], pair["glued"]) == ("\nTim", "\nTom", False)
    dialogue = pairs_of({"chosen": DIALOGUE + " Yes.", "rejected": DIALOGUE + " No."}, separator="\n")[0]
    assert dialogue["chosen_text"] == " Yes."


def test_odd_pairs_are_counted(pairs_of: Load) -> None:
    def found(*records: Any, **text: Any) -> dict[str, int]:
        return {issue.what: issue.found for issue in quality_issues(pairs_of(*records, **text), control=False)}

    pairs = [(" good", " good "), (" x", " y"), (" y", " x"), (" z", " x")]
    records = [{"prompt": "P", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    assert found(*records) == {"pairs differ in blanks only": 1, "pairs contradict another one": 2}
    long = {"prompt": "P", "chosen": " one two three four", "rejected": " one two three five"}
    assert found(long) == {}
    assert found(long, max_response_length=2) == {"pairs are equal after truncation": 1}


def test_records_that_stand_in_training_and_validation_are_counted(
    demos_of: Load, attach: Load, write_jsonl: Writer
) -> None:
    records = [{"prompt": f"P{n}", "completion": " yes"} for n in range(4)]
    train, validation = (
        write_jsonl("t.jsonl", records),
        write_jsonl("v.jsonl", [*records[3:], {"prompt": "Q", "completion": " yes"}]),
    )
    data = SFTDataModule(Source(train), Source(validation), batch_size=2, micro_batch_size=1)
    with pytest.warns(UserWarning, match=r"data\.validation: 1 of 2 records stand in data\.train, too"):
        attach(data)
    assert overlap(data.splits["validation"], data.splits["train"]) == 1


def test_one_reason_per_kind_whatever_the_length(demos_of: Load) -> None:
    records = [{"prompt": "word " * n, "completion": " b"} for n in (1, 20, 30, 40)]
    with pytest.warns(UserWarning, match=r"\(tokens of the prompt: more than 9: 3, first in record 2; records count"):
        demos_of(*records, max_query_length=9, drop_unfittable=True)


# ------------------------------------------------------------------------------------------------------- special tokens


def test_special_tokens_in_texts_are_text_and_counted(demos_of: Load, tokenizer: Any) -> None:
    record = {"prompt": f"yes {EOS} no [PAD]{EOS}", "completion": " Hi"}
    with pytest.warns(UserWarning, match=r"1 of 2 records hold special tokens .* as text.*data\.text\.special_tokens"):
        row = demos_of(record, {"prompt": "a", "completion": " b"})[0]
    assert tokenizer.decode(row["input_ids"]) == record["prompt"] + " Hi" + EOS
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in row["input_ids"]
    assert row["response_start"] == len(row["query_ids"])


def test_special_tokens_are_control_ids_if_so_set(demos_of: Load, tokenizer: Any) -> None:
    row = demos_of({"prompt": f"yes{EOS}", "completion": " Hi"}, special_tokens="control")[0]
    assert row["query_ids"] == [*tokenizer("yes")["input_ids"], tokenizer.eos_token_id]
    assert row["input_ids"][: row["response_start"]] == row["query_ids"]  # the prompt keeps its EOS


@pytest.mark.parametrize("special_tokens", ["text", "control"])
def test_no_second_bos_and_one_eos(demos_of: Load, llama: Any, special_tokens: str) -> None:
    records = [{"prompt": p + "Once", "completion": " upon" + e} for p in ("", "<s>") for e in ("", EOS, EOS + "\n")]
    rows = demos_of(*records, use=llama, special_tokens=special_tokens)
    assert [*map(llama.decode, rows["input_ids"][:])] == ["<s>Once upon" + EOS] * 6
    assert rows["input_ids"][0].count(llama.bos_token_id) == 1
    assert rows["reference"][:] == [" upon"] * 6
    assert not any(rows["special"][:])


def test_reasons_name_what_helps(demos_of: Load) -> None:
    with pytest.raises(UserError) as refused:
        demos_of({"messages": "no list", "id": 1})
    assert re.search("messages holds no list of messages", str(refused.value))
