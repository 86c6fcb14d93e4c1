"""From records to token ids: the formats of demonstrations, prompts and comparisons, TRL's among them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.data.chat import (
    Messages,
    conversation_query,
    is_conversation,
    join_answer,
    readable,
    split_conversation,
)
from rlhf.data.sources import Schemas
from rlhf.data.texts import (
    BadRecordError,
    Record,
    TextFormat,
    end_response,
    fields_of,
    is_article,
    join_response,
    one_leading_space,
    plain_query,
    required_text,
    tldr_query,
    without_eos,
)
from rlhf.models.tokenizers import encode, eos_ids, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Messages


def demonstration_schemas(text: TextFormat) -> Schemas:
    """Returns the formats of demonstrations: the first whose columns are there is taken."""
    own = fields_of(text.completion) if text.completion else ("completion",)
    if text.prompt is not None:
        return {"plain": own}
    return {
        "tldr": (*fields_of(text.query), "summary"),
        "plain": ("prompt", *own),
        "messages": ("messages",),
        "conversations": ("conversations",),
        "text": ("text",),
        "pair": ("chosen", "rejected"),
    }


def prompt_schemas(text: TextFormat) -> Schemas:
    """Returns the formats of prompts; what is a demonstration gives the prompt of that demonstration."""
    if text.prompt is not None:
        return {"plain": ()}
    known = demonstration_schemas(text)
    return {"tldr": fields_of(text.query), "plain": known["plain"], "messages": known["messages"],
            "conversations": known["conversations"], "pair": known["pair"], "prompt": ("prompt",)}  # fmt: skip


def comparison_schemas(text: TextFormat) -> Schemas:
    """Returns the formats of comparisons."""
    return {"openai": ("info", "summaries", "choice"), "pair": ("chosen", "rejected")}


class Query(NamedTuple):
    """The text or conversation that a response answers."""

    text: str  # in readable form
    ids: list[int]
    messages: Messages | None = None  # if it is a conversation


def demonstration(
    record: Record, tokenizer: PreTrainedTokenizerBase, text: TextFormat, schema: str, need_response: bool
) -> Record:
    """Tokenises a demonstration of one of the `demonstration_schemas`, or with `need_response` false a mere prompt."""
    response: Text
    if schema == "tldr":
        query = Query(*tldr_query(record, tokenizer, text))
        response = required_text(record, "summary") if need_response else str(record.get("summary") or "")
        response = one_leading_space(response) if response else ""
    elif schema == "text":
        return _language(required_text(record, "text"), tokenizer, text)
    else:
        prompt, response = _prompt_and_response(record, text, schema, need_response)
        query = _query(prompt, response, tokenizer, text)
    known = {"query": query.text, "query_ids": query.ids, "messages": query.messages}
    if response:
        return {**known, **_join(query, response, tokenizer, text)}
    row = end_response(query.ids, len(query.ids), eos_ids(tokenizer)[0], text.max_response_length)
    notes = _notes("" if query.messages else query.text, "", tokenizer, text.special_tokens == "control")
    return {**known, "reference": "", **row, **notes}


def comparison(record: Record, tokenizer: PreTrainedTokenizerBase, text: TextFormat, schema: str) -> Record:
    """Tokenises both sides of a comparison of one of the `comparison_schemas`."""
    row: Record = {"batch": "", "confidence": None, "chosen_policy": "", "rejected_policy": ""}
    max_length = text.max_response_length
    sides: list[Text]
    if schema == "openai":
        info = record["info"] or {}
        query = Query(*tldr_query(info, tokenizer, text))
        if is_article(info):
            max_length = text.max_article_response_length
        summaries, choice = record["summaries"] or [], record["choice"]
        if len(summaries) != 2 or None in summaries:
            raise BadRecordError("not 2 summaries")
        if choice not in (0, 1):
            raise BadRecordError("choice is out of range")
        pair = [summaries[int(choice)], summaries[1 - int(choice)]]
        sides = [one_leading_space(required_text(s, "text")) for s in pair]
        row = {
            "batch": record.get("batch") or "",
            "confidence": (record.get("extra") or {}).get("confidence"),
            "chosen_policy": pair[0].get("policy") or "",
            "rejected_policy": pair[1].get("policy") or "",
        }
    else:
        prompt, *sides = _pair(record, text)
        query = _query(prompt, sides[0], tokenizer, text)
    if sides[0] == sides[1]:
        raise BadRecordError("chosen and rejected are equal")
    chosen, rejected = (_join(query, side, tokenizer, text, max_length) for side in sides)
    for side, joint in (("chosen", chosen), ("rejected", rejected)):
        row |= {f"{side}_text": joint["reference"], f"{side}_ids": joint["input_ids"]}
        row[f"{side}_start"] = joint["response_start"]
    row |= {name: chosen[name] or rejected[name] for name in ("truncated", "glued", "special")}
    row["equal"] = chosen["input_ids"] == rejected["input_ids"]
    row["blanks"] = chosen["reference"].split() == rejected["reference"].split()
    return {"query": query.text, "messages": query.messages, **row}


# ------------------------------------------------------------------------------------ prompts and responses of records


def _prompt_and_response(record: Record, text: TextFormat, schema: str, need_response: bool) -> tuple[Text, Text]:
    if schema in ("messages", "conversations"):
        if not is_conversation(record[schema]):
            raise BadRecordError(f"{schema} holds no list of messages")
        return split_conversation(record[schema], need_response)
    if schema == "pair":
        prompt, chosen, _ = _pair(record, text)
        return prompt, chosen
    prompt = _filled(record, "prompt", text.prompt, text)
    try:
        completion = _filled(record, "completion", text.completion, text)
    except BadRecordError:
        if need_response:
            raise
        return prompt, ""
    if isinstance(completion, list):
        return split_conversation([*_messages(prompt, "user"), *completion], need_response)
    return prompt, _separated(prompt, completion, text)


def _pair(record: Record, text: TextFormat) -> tuple[Text, Text, Text]:
    chosen, rejected = (_filled(record, side, None, text) for side in ("chosen", "rejected"))
    stated = text.prompt is not None or record.get("prompt") is not None
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt = _messages(_filled(record, "prompt", text.prompt, text), "user") if stated else []
        return _conversations(prompt, chosen, rejected)
    if isinstance(chosen, list) or isinstance(rejected, list):
        raise BadRecordError("chosen and rejected are not both conversations")
    if stated:
        stated_prompt = _filled(record, "prompt", text.prompt, text)
        return stated_prompt, _separated(stated_prompt, chosen, text), _separated(stated_prompt, rejected, text)
    shared = chosen[: _shared(chosen, rejected)]
    cut = shared.rfind(text.last_turn) + len(text.last_turn)
    if text.last_turn not in shared:
        raise BadRecordError(f"no prompt, and no {text.last_turn!r} (data.text.last_turn) that both sides share")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side[cut:].strip():
            raise BadRecordError(f"{name} without a text in its last turn")
        if text.last_turn in side[cut:]:
            raise BadRecordError("chosen and rejected differ before their last turn")
    return shared[:cut], chosen[cut:], rejected[cut:]


def _conversations(prompt: Messages, chosen: Messages, rejected: Messages) -> tuple[Text, Text, Text]:
    """Splits conversations where their last turns begin; the prompt may stand in front of them or in them."""
    both = [[*prompt, *side] if side[0]["role"] == "assistant" else side for side in (chosen, rejected)]
    shared = both[0][: min(_shared(*both), min(map(len, both)) - 1)]
    answers = [side[len(shared) :] for side in both]
    for name, answer in (("chosen", answers[0]), ("rejected", answers[1])):
        if answer[-1]["role"] != "assistant":
            raise BadRecordError(f"{name} without an assistant's turn at its end")
        if any(message["role"] == "user" for message in answer):
            raise BadRecordError("chosen and rejected differ before their last turn")
    if not shared:
        raise BadRecordError("chosen and rejected without a message before their answer")
    return shared, answers[0], answers[1]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Counts the elements at the beginning that two sequences share."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def _messages(value: Text, role: str) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _separated(prompt: Text, response: Text, text: TextFormat) -> Text:
    """Puts the separator in front of a response, unless one of the two is a conversation."""
    return text.separator + response if isinstance(prompt, str) and isinstance(response, str) else response


class _Texts(list[Any]):
    """A list in a format: `{column[0]}` is one of its texts, `{column}` all of them, joined."""

    def __init__(self, column: str, texts: list[Any], join: str | None) -> None:
        super().__init__(texts)
        self.column, self.join = column, join

    def __format__(self, spec: str) -> str:
        return _joined(self.column, self, self.join)


def _joined(column: str, texts: list[Any], join: str | None) -> str:
    if not all(isinstance(part, str) for part in texts):
        raise BadRecordError(f"{column} is a list, but neither of texts nor of messages")
    if join is None:
        raise BadRecordError(f"{column} is a list of texts; data.text.join says what to put between them")
    return join.join(texts)


def _filled(record: Record, column: str, template: str | None, text: TextFormat) -> Text:
    """Returns the text or conversation of a column, or the text that its format makes of other columns."""
    if template is not None:
        fields: Record = dict.fromkeys(fields_of(template), "")
        for name, value in record.items():
            if value is not None:
                fields[name] = _Texts(name, value, text.join) if isinstance(value, list) else value
        try:
            return required_text({column: template.format(**fields)}, column)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise BadRecordError(f"data.text.{column} does not fit ({error})") from error
    value = record.get(column)
    if is_conversation(value):
        return list(value)  # type: ignore[arg-type]
    if isinstance(value, list) and value:
        value = _joined(column, value, text.join)
    return required_text({column: value}, column)


# ----------------------------------------------------------------------------------------------- tokens and their notes


def _query(prompt: Text, response: Text, tokenizer: PreTrainedTokenizerBase, text: TextFormat) -> Query:
    """Tokenises a prompt, as a conversation if it or the response is one."""
    if isinstance(prompt, str) and isinstance(response, str):
        return Query(prompt, plain_query(prompt, tokenizer, text))
    messages = _messages(prompt, "user")
    return Query(readable(messages), conversation_query(messages, tokenizer, text), messages)


def _join(
    query: Query, response: Text, tokenizer: PreTrainedTokenizerBase, text: TextFormat, max_length: int | None = None
) -> Record:
    if query.messages is not None:
        row = join_answer(tokenizer, query.messages, _messages(response, "assistant"), text)
        return {**row, "glued": False, "special": False}
    assert isinstance(response, str)
    control = text.special_tokens == "control"
    row = join_response(tokenizer, query.text, query.ids, response, max_length or text.max_response_length, control)
    return {**row, "turns": None, **_notes(query.text, row["reference"], tokenizer, control)}


def _language(whole: str, tokenizer: PreTrainedTokenizerBase, text: TextFormat) -> Record:
    """Tokenises a text without a prompt, which begins with BOS, or EOS if there is none, to be sampled from there."""
    control, bos = text.special_tokens == "control", tokenizer.bos_token_id
    start = encode(tokenizer, "") or [eos_ids(tokenizer)[0] if bos is None else bos]
    whole, eos = without_eos(tokenizer, whole)
    ids = encode(tokenizer, whole, control)
    ids = ids if ids[: len(start)] == start else start + ids
    row = end_response(ids, len(start), eos, text.max_query_length + text.max_response_length)
    return {"query": "", "query_ids": start, "reference": whole, **row, **_notes("", whole, tokenizer, control)}


def _notes(query: str, response: str, tokenizer: PreTrainedTokenizerBase, control: bool) -> Record:
    """Says whether query and response meet without a blank, and whether they hold special tokens."""
    whole, special = query.removeprefix(tokenizer.bos_token or "") + response, special_tokens(tokenizer)
    held = any(token in whole for token in special)
    if held and not control:
        ids = tokenizer(whole, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not set(ids).isdisjoint(special.values()):
            raise BadRecordError("a special token that this tokenizer cannot read as text")
    glued = bool(query and response) and not query[-1].isspace() and not response[0].isspace()
    return {"glued": glued, "special": held}
