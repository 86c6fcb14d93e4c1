"""Conversations: lists of messages, which the tokenizer's chat template writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.texts import BadRecordError, Record, TextFormat, UnfittableError, border, end_response
from rlhf.errors import UserError
from rlhf.models.tokenizers import eos_ids, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT


def is_conversation(value: Any) -> bool:
    """Tells a list of messages from texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def as_messages(value: Any) -> Any:
    """Returns a conversation in ShareGPT's form, a list of `from` and `value`, as messages; anything else as it is."""
    if not (
        isinstance(value, list) and value and all(isinstance(m, dict) and {"from", "value"} <= set(m) for m in value)
    ):
        return value
    return [{"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in value]


def take_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Gives a tokenizer the template of the setting `data.text.chat_template`; its exports carry it."""
    if template is None:
        return
    if "{" not in template:  # no Jinja
        try:
            template = Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.text.chat_template: the file {template} cannot be read: {error}.") from error
    tokenizer.chat_template = template


def split_conversation(messages: Messages, need_response: bool) -> tuple[Messages, Messages]:
    """Splits a conversation before the assistant's last turn, if it needs one or ends with one."""
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if need_response and not turns:
        raise BadRecordError("a conversation without an assistant's turn")
    if not need_response and messages[-1]["role"] != "assistant":
        return messages, []
    return messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]


def readable(messages: Messages) -> str:
    """Returns a conversation as people write one, up to where the assistant answers."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def conversation_query(messages: Messages, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> list[int]:
    """Returns the token ids of a conversation up to where the assistant answers, which are never cut."""
    if text_format.special_tokens == "text":
        _check_contents(messages, tokenizer)
    ids = _ids(tokenizer, _render(tokenizer, messages, answer=True))
    if len(ids) > text_format.max_query_length:
        raise UnfittableError(f"tokens of the conversation before its answer: more than {text_format.max_query_length}")
    return ids


def conversation_of(record: Mapping[str, Any]) -> Messages | None:
    """Returns the conversation that a `record` of a row asks the assistant to continue; None if it is none."""
    prompt = record.get("prompt")
    return prompt if is_conversation(prompt) else None


def refuse_conversations(records: Iterable[str], setting: str) -> None:
    """Refuses conversations (JSON) for a reward model with another tokenizer: what marks turns would be lost."""
    if any(conversation_of(json.loads(record)) is not None for record in records):
        raise UserError(
            f"{setting}: the reward model has another tokenizer than the policy, and reads no conversations of it; "
            "take one that was trained from the same SFT model."
        )


def answered_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: str) -> list[int]:
    """Returns the token ids of a conversation and of the text of an answer, with the EOS that the template writes."""
    any_answer = [{"role": "assistant", "content": "a"}]
    eos = join_answer(tokenizer, messages, any_answer, TextFormat(special_tokens="control"))["input_ids"][-1]
    return [*_ids(tokenizer, _render(tokenizer, messages, answer=True) + answer), eos]


def join_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: Messages, text_format: TextFormat
) -> Record:
    """Tokenises a conversation and the answer to it as one text (D07), up to the EOS that the template writes (D04).

    Returns:
        What `rlhf.data.texts.join_response` does, and `turns`: starts and ends of all turns of the assistant, one after
        the other; none if the template writes earlier turns in another way than the last one.
    """
    if not str(answer[-1].get("content") or "").strip():
        raise BadRecordError("an answer without a text")
    if text_format.special_tokens == "text":
        _check_contents(answer, tokenizer)
    query = _render(tokenizer, messages, answer=True)
    before = _render(tokenizer, [*messages, *answer[:-1]], answer=True) if len(answer) > 1 else query
    whole = _render(tokenizer, [*messages, *answer])
    if not (whole.startswith(query) and whole.startswith(before)):
        raise BadRecordError("the chat template does not write the answer behind its generation prompt")
    ids = _ids(tokenizer, whole)
    end = _end_of_turn(tokenizer, ids, border(ids, _ids(tokenizer, before)))
    if end is None:
        raise _no_eos(tokenizer, whole[len(before) :])
    start = border(ids, _ids(tokenizer, query))
    row = end_response(ids[:end], start, ids[end], text_format.max_response_length)
    text, eos = whole[len(before) :], str(tokenizer.convert_ids_to_tokens(ids[end]))
    turns = [*_earlier_turns(tokenizer, messages, ids, whole), start, len(row["input_ids"])]
    row["turns"] = turns if len(turns) == 2 * sum(m["role"] == "assistant" for m in [*messages, answer[-1]]) else []
    return {**row, "reference": whole[len(query) : len(before)] + text.partition(eos)[0]}


def _earlier_turns(tokenizer: PreTrainedTokenizerBase, messages: Messages, ids: list[int], whole: str) -> list[int]:
    turns: list[int] = []
    for n in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
        before = _render(tokenizer, messages[:n], answer=True)
        start = border(ids, _ids(tokenizer, before))
        end = _end_of_turn(tokenizer, ids, start)
        if end is None or not whole.startswith(before):
            continue
        if _ids(tokenizer, _render(tokenizer, messages[: n + 1]))[: end + 1] == ids[: end + 1]:
            turns += [start, end + 1]
    return turns


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int) -> int | None:
    """Returns the position of the first EOS from `start` on; what the template writes behind it belongs to no turn."""
    ends = eos_ids(tokenizer)
    return next((n for n in range(start, len(ids)) if ids[n] in ends), None)


def _no_eos(tokenizer: PreTrainedTokenizerBase, turn: str) -> UserError:
    found = [token for token in special_tokens(tokenizer) if token in turn]
    known = ", ".join(repr(tokenizer.convert_ids_to_tokens(n)) for n in eos_ids(tokenizer))
    last = max(found, key=turn.rfind, default="")
    advice = f"set model.eos_tokens to ['{last}']" if last else "set data.text.chat_template to one that writes EOS"
    found_text = repr(last or turn[-20:])
    return UserError(f"The chat template ends an assistant's turn with {found_text}, not with {known}; {advice}.")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: bool = False) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    if not tokenizer.chat_template:
        raise UserError(
            "The data holds conversations, but the tokenizer has no chat template; set data.text.chat_template to a "
            "Jinja template or a file with one."
        )
    if any(not isinstance(message.get("content"), str) for message in messages):
        raise BadRecordError("a message whose content is no text")
    known = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        text = tokenizer.apply_chat_template(known, tokenize=False, add_generation_prompt=answer)
    except TemplateSyntaxError as error:
        raise UserError(f"data.text.chat_template is broken in its line {error.lineno}: {error.message}") from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise BadRecordError(f"the chat template refuses the conversation ({error})") from error
    return str(text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # BOS is the template's business
    return ids


def _check_contents(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> None:
    for message in messages:
        if any(token in str(message.get("content")) for token in special_tokens(tokenizer)):
            raise BadRecordError("a message with a special token, which data.text.special_tokens: control would let in")
