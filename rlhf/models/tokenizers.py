"""Tokenizers: loading, the ids of texts, the texts of ids, and the tokens that end a response."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError
from rlhf.models.loading import check_model_path, first_line, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PAD_TOKEN = "[PAD]"
_EOS_IDS = "rlhf_eos_ids"  # attribute of a loaded tokenizer


def load_tokenizer(
    path: str, pad_token: str | None = None, setting: str = "model.model_path"
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, and makes sure that its PAD is not EOS (D05).

    Args:
        pad_token: token to pad with, added if the tokenizer does not have it. None keeps the tokenizer's own PAD, or
            adds `[PAD]` if there is none.
    """
    from transformers import AutoTokenizer

    check_model_path(path, setting)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{setting}: {path} has no tokenizer that can be loaded: {first_line(error)}") from error
    if not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(f"{setting}: {path} has no tokenizer that can be loaded: it holds no vocabulary.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{setting}: the tokenizer of {path} has no EOS token, so no response could ever end.")
    if pad_token is not None or tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": pad_token or PAD_TOKEN})
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{setting}: the tokenizer of {path} pads with its EOS token {tokenizer.eos_token!r}, which would hide the "
            f"end of every response; set model.pad_token to another token, for example '{PAD_TOKEN}'."
        )
    return tokenizer


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids of all tokens that end a response; the first one is written behind demonstrations."""
    return getattr(tokenizer, _EOS_IDS, None) or (tokenizer.eos_token_id,)


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
    tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {token: number for token, number in tokens.items() if token != tokenizer.unk_token}


def decode_responses(
    tokenizer: PreTrainedTokenizerBase, queries: list[list[int]], responses: list[list[int]]
) -> list[str]:
    """Returns the texts of responses, without special tokens; `queries` are the token ids in front of each."""
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


def check_pad_in_embedding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, path: str) -> None:
    """Refuses a PAD or EOS without a row in the embedding matrix, which is not resized (D05)."""
    vocab_size = config.get_text_config().vocab_size
    if max(tokenizer.pad_token_id, tokenizer.eos_token_id) >= vocab_size:
        raise UserError(
            f"PAD {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, outside the embedding of {path} with its "
            f"{vocab_size} rows; set model.pad_token to a token of the tokenizer that no text uses, or "
            "model.resize_embeddings to true in the SFT stage."
        )


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model and its tokenizer in Hugging Face format, with PAD and EOS in the configuration."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
