"""Tokenizers: loading, the ids of texts, the texts of ids, and the tokens that end a response."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.models.adapter_files import ADAPTER_FILE, holder
from rlhf.models.library_calls import explained, quiet
from rlhf.models.loading import check_language_model, check_model_path, load_config, load_generation_config
from rlhf.models.remote_code import trusts_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PAD_TOKEN = "[PAD]"
_EOS_IDS, _SPECIAL = "rlhf_eos_ids", "rlhf_special_tokens"  # attributes of a loaded tokenizer
_SPARE = ("pad", "reserved", "unused", "extra", "unk")  # in the names of tokens that no text uses, the best first


def load_tokenizer(
    path: str,
    pad_token: str | None = None,
    setting: str = "model.model_path",
    eos_tokens: Sequence[str] | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, and makes sure that its PAD is not EOS (D05).

    Args:
        pad_token: token to pad with, added if the tokenizer does not have it. None keeps the tokenizer's own PAD, or
            adds `[PAD]` if there is none.
        eos_tokens: tokens that end a response; the first one is written behind demonstrations. None takes the
            tokenizer's own EOS, and those that the model's files name besides.
    """
    from transformers import AutoTokenizer

    check_model_path(path, setting, "tokenizer.json")
    if _has_config(path):
        load_config(path, setting)  # says itself what is wrong with it
    sentence = f"{setting}: {path} has no tokenizer that can be loaded"
    with explained(sentence), quiet():
        try:
            found = os.path.expanduser(holder(path, setting, "tokenizer.json", "tokenizer_config.json"))
            tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=trusts_remote_code())
        except Exception as error:
            if re.search("sentencepiece|tiktoken", str(error).lower()) and find_spec("sentencepiece") is None:
                needed = "it has no tokenizer.json; to read its SentencePiece file, `pip install sentencepiece`."
                raise UserError(f"{sentence}: {needed}") from error
            raise
    if not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(f"{setting}: {path} has no tokenizer that can be loaded: it holds no vocabulary.")
    _set_eos(tokenizer, path, setting, eos_tokens)
    if pad_token is not None or tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": pad_token or PAD_TOKEN})
    if tokenizer.pad_token_id in eos_ids(tokenizer):
        raise UserError(
            f"{setting}: the tokenizer of {path} pads with its EOS token {tokenizer.pad_token!r}, which would hide the "
            f"end of every response; set model.pad_token to another token, for example '{suggested_pad(tokenizer)}'."
        )
    return tokenizer


def _set_eos(tokenizer: PreTrainedTokenizerBase, path: str, setting: str, eos_tokens: Sequence[str] | None) -> None:
    if eos_tokens:
        first, *others = (_single_id(tokenizer, token) for token in eos_tokens)
        if first not in tokenizer.added_tokens_decoder:  # as EOS it would be cut out of every text
            raise UserError(
                f"model.eos_tokens: {eos_tokens[0]!r} is an ordinary token, and the first one is written behind every "
                f"demonstration; begin with a special token such as {tokenizer.eos_token or '</s>'!r}."
            )
        tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(first))
    elif tokenizer.eos_token_id is None:
        raise UserError(
            f"{setting}: the tokenizer of {path} has no EOS token, so no response could ever end; name one in "
            "model.eos_tokens."
        )
    else:
        known = set(tokenizer.get_vocab().values())
        others = [id_ for id_ in named_eos_ids(path, setting, tokenizer) if id_ in known]
    setattr(tokenizer, _EOS_IDS, tuple(dict.fromkeys([tokenizer.eos_token_id, *others])))


def _single_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Returns the id of a token, by its name in the vocabulary or by a text that is this one token."""
    known = tokenizer.get_vocab().get(token)
    if known is not None:
        return known
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"model.eos_tokens: {token!r} is {len(ids)} tokens of the tokenizer "
            f"({', '.join(map(repr, tokenizer.convert_ids_to_tokens(ids)))}), and a response ends with a single one."
        )
    return ids[0]


def named_eos_ids(path: str, setting: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the EOS ids that a model's `generation_config.json`, or else its `config.json`, names, if it has one.

    A single id of `config.json` may be the default of its class, so it counts only if it is no ordinary token.
    """
    if not _has_config(path):
        return []
    config = load_config(path, setting)
    generation, own = load_generation_config(path, config)
    ids = generation.eos_token_id
    if isinstance(ids, int):
        return [ids] if own or ids in tokenizer.added_tokens_decoder else []
    return list(ids or ())


def _has_config(path: str) -> bool:
    folder = Path(path).expanduser()
    return not folder.is_dir() or any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE))


def eos_disagreement(tokenizer: PreTrainedTokenizerBase, path: str, setting: str) -> str:
    """Says which EOS the files of a model name if it is not that of the tokenizer, else nothing."""
    generation, _ = load_generation_config(path, load_config(path, setting))
    ids = generation.eos_token_id
    named = [ids] if isinstance(ids, int) else list(ids or ())
    if not named or eos_ids(tokenizer)[0] in named:
        return ""
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(id_)!r}, id {id_}" for id_ in named)
    return f"but the configuration of {path} names {shown}"


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids of all tokens that end a response; the first one is written behind demonstrations."""
    return getattr(tokenizer, _EOS_IDS, None) or (tokenizer.eos_token_id,)


def suggested_pad(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> str:
    """Names a token to pad with: one that is called so, or that no text uses; `[PAD]` if there is none.

    Args:
        rows: of the embedding; only tokens that have one.
    """
    taken = {tokenizer.bos_token_id, *eos_ids(tokenizer)}
    added = sorted(tokenizer.added_tokens_decoder.items())
    spare = [str(token) for id_, token in added if id_ not in taken and (rows is None or id_ < rows)]
    return next((token for word in _SPARE for token in spare if word in token.lower()), PAD_TOKEN)


def content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what decides the ids of texts, as a text; padding and truncation, which change with every use, do not."""
    if tokenizer.is_fast:
        found = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    else:
        settings = {name: repr(value) for name, value in tokenizer.init_kwargs.items()}
        found = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "settings": settings}
    return json.dumps(found | {"eos": eos_ids(tokenizer), "chat": tokenizer.chat_template}, sort_keys=True)


def check_reference(path: str, setting: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a reference that does not read the tokens of the policy; no weights are loaded."""
    check_language_model(path, setting)
    if not same_tokens(tokenizer, load_tokenizer(path, PAD_TOKEN, setting)):
        raise UserError(f"{setting}: {path} has other tokens than the policy, so no ratio of the two is known.")


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Tells whether an id means the same token to two tokenizers, PAD aside."""
    pads = {one.pad_token, other.pad_token}
    ours, theirs = ({k: v for k, v in x.get_vocab().items() if k not in pads} for x in (one, other))
    return ours == theirs


def encode(tokenizer: PreTrainedTokenizerBase, text: str, control: bool = False) -> list[int]:
    """Returns the token ids of a text, with what the tokenizer puts in front, without an EOS that it may append.

    A text that begins with BOS gets no second one.

    Args:
        control: whether other special tokens in the text become their ids; otherwise they are text.
    """
    front, bos = _front(tokenizer), tokenizer.bos_token
    if bos and text.startswith(bos):
        text, front = text.removeprefix(bos), front or [tokenizer.bos_token_id]
    return front + tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"]


def _front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that a tokenizer puts in front of a text."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return next((full[:n] for n in range(len(full)) if full[n : n + len(bare)] == bare), [])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the texts and ids of the special tokens of a tokenizer, but that of unknown ones."""
    known = len(tokenizer), tokenizer.unk_token
    kept: tuple[Any, dict[str, int]] = getattr(tokenizer, _SPECIAL, (None, {}))
    if kept[0] != known:  # a vocabulary with thousands of them takes long to list
        added = tokenizer.added_tokens_decoder.items()
        tokens = {t.content: number for number, t in added if t.special and t.content != tokenizer.unk_token}
        kept = (known, tokens)
        setattr(tokenizer, _SPECIAL, kept)
    return kept[1]


def decode_responses(
    tokenizer: PreTrainedTokenizerBase, queries: list[list[int]], responses: list[list[int]]
) -> list[str]:
    """Returns the texts of responses up to their first EOS, without special tokens.

    A response is what query and response have together beyond the query: alone, its first blank may be lost.

    Args:
        queries: the token ids in front of each response.
    """
    ends = eos_ids(tokenizer)
    bodies = [[*takewhile(lambda id_: id_ not in ends, response)] for response in responses]
    before = decode(tokenizer, queries)
    both = decode(tokenizer, [query + body for query, body in zip(queries, bodies, strict=True)])
    return [text[_shared(text, query) :] for text, query in zip(both, before, strict=True)]


def _shared(text: str, query: str) -> int:
    """Counts the characters that begin both; not all of a query if it ends within one that the response completes."""
    if text.startswith(query):
        return len(query)
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(text, query, strict=False)))


def decode(tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]) -> list[str]:
    """Returns the texts of token ids, without special tokens and without ids that the tokenizer does not have."""
    if not tokenizer.is_fast:  # the others leave such ids out by themselves
        known = set(tokenizer.get_vocab().values())
        sequences = [[id_ for id_ in ids if id_ in known] for ids in sequences]
    return tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def retokenise(
    sequences: list[list[int]], source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Returns sequences in the ids of another tokenizer, by way of their texts; one that ends with EOS still does."""
    ends = eos_ids(source)
    ended = [bool(ids) and ids[-1] in ends for ids in sequences]
    texts = decode(source, [ids[:-1] if end else ids for ids, end in zip(sequences, ended, strict=True)])
    last = [eos_ids(target)[0]]
    return [encode(target, text) + last * end for text, end in zip(texts, ended, strict=True)]


def check_row(id_: int, rows: int, tokenizer: PreTrainedTokenizerBase, path: str, where: str) -> None:
    """Refuses the largest token id of some texts if the embedding of a model, with so many rows, has none for it."""
    if id_ >= rows:
        raise UserError(
            f"{where} holds the token {tokenizer.convert_ids_to_tokens(id_)!r} with id {id_}, but the embedding of "
            f"{path} has {rows} rows; its tokenizer does not fit it, unless the SFT stage adds rows "
            "(model.resize_embeddings)."
        )


def check_pad_in_embedding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, path: str) -> None:
    """Refuses a PAD or EOS without a row in the embedding matrix, which is not resized (D05)."""
    vocab_size = config.get_text_config().vocab_size
    if max(tokenizer.pad_token_id, tokenizer.eos_token_id) >= vocab_size:
        spare = suggested_pad(tokenizer, vocab_size)
        example = "" if spare == PAD_TOKEN else f", for example '{spare}'"
        raise UserError(
            f"PAD {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, outside the embedding of {path} with its "
            f"{vocab_size} rows; set model.pad_token to a token of the tokenizer that no text uses{example}, or "
            "model.resize_embeddings to true in the SFT stage."
        )
