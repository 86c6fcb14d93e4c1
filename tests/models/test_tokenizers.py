"""Tokenizers of all kinds: their special tokens, and texts that survive the way through ids and back."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, ByT5Tokenizer, GPTNeoXConfig, PreTrainedTokenizerFast

from rlhf.errors import UserError
from rlhf.models.loading import load_config
from rlhf.models.tokenizers import (
    check_pad_in_embedding,
    content,
    decode_responses,
    encode,
    eos_ids,
    load_tokenizer,
    retokenise,
    same_tokens,
    suggested_pad,
)

SETTING = "model.some_path"


@pytest.fixture
def save_tokenizer(model_path: str, tmp_path: Path) -> Callable[..., str]:
    """Saves the tokenizer with other special tokens and returns the folder."""

    def save(**special: str | None) -> str:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        for name, token in special.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text((Path(model_path) / "config.json").read_text())
        return str(tmp_path)

    return save


def test_the_tokenizers_own_pad_is_kept(model_path: str) -> None:
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.pad_token == "[PAD]"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(("wanted", "pad"), [(None, "[PAD]"), ("<fill>", "<fill>")])
def test_a_missing_pad_is_added(save_tokenizer: Callable[..., str], wanted: str | None, pad: str) -> None:
    tokenizer = load_tokenizer(save_tokenizer(pad_token=None), wanted)
    assert tokenizer.pad_token == pad
    assert tokenizer.encode(pad) == [tokenizer.pad_token_id]


def test_pad_that_is_eos_is_refused(save_tokenizer: Callable[..., str], model_path: str) -> None:
    eos = "<|endoftext|>"
    with pytest.raises(UserError, match=r"model\.some_path.*pads with its EOS.*model\.pad_token"):
        load_tokenizer(save_tokenizer(pad_token=eos), None, SETTING)
    with pytest.raises(UserError, match="pads with its EOS"):
        load_tokenizer(model_path, eos)


def test_a_tokenizer_without_eos_is_refused(save_tokenizer: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"model\.some_path.*no EOS token"):
        load_tokenizer(save_tokenizer(eos_token=None), None, SETTING)


def test_pad_must_have_a_row_in_the_embedding(model_path: str) -> None:
    tokenizer = load_tokenizer(model_path)
    check_pad_in_embedding(tokenizer, GPTNeoXConfig(vocab_size=tokenizer.pad_token_id + 1), "here")
    check_pad_in_embedding(tokenizer, load_config(model_path, SETTING), "here")
    with pytest.raises(UserError, match=rf"PAD '\[PAD\]' has id {tokenizer.pad_token_id}, outside .* model.pad_token"):
        check_pad_in_embedding(tokenizer, GPTNeoXConfig(vocab_size=tokenizer.pad_token_id), "here")


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "llama"])
def test_a_missing_tokenizer_is_named(model_type: str, tmp_path: Path) -> None:
    """For some architectures transformers makes up a tokenizer that knows no text."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"model\.some_path.*no tokenizer"):
        load_tokenizer(str(tmp_path), None, SETTING)


# ------------------------------------------------------------------ texts of responses


def test_a_response_keeps_its_first_blank(llama_path: str) -> None:
    tokenizer = load_tokenizer(llama_path)
    query, response = "my sister", " is a teacher."
    ids = encode(tokenizer, query)
    answer = encode(tokenizer, query + response)[len(ids) :]
    assert tokenizer.decode(answer) == "is a teacher."  # so it is decoded alone
    assert decode_responses(tokenizer, [ids], [[*answer, tokenizer.eos_token_id, 5]]) == [response]


@pytest.mark.parametrize("path", ["llama_path", "model_path"])
def test_a_character_that_query_and_response_share_belongs_to_the_response(
    path: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(path))
    ids = encode(tokenizer, "a 😀 b")
    borders = [n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd")]
    assert len(borders) >= 1
    for border in borders:
        assert decode_responses(tokenizer, [ids[:border]], [ids[border:]]) == ["😀 b"]


def test_bytes_that_are_no_text_do_not_fail(llama_path: str) -> None:
    tokenizer = load_tokenizer(llama_path)
    lone = tokenizer.convert_tokens_to_ids("<0xF0>")
    assert decode_responses(tokenizer, [encode(tokenizer, "a")], [[lone]]) == ["\ufffd"]


@pytest.mark.parametrize("end", [["</s>"], ["</s>", "<0x0A>"]])
def test_a_text_ends_before_the_first_eos(llama_path: str, end: list[str]) -> None:
    tokenizer = load_tokenizer(llama_path, eos_tokens=end)
    query = encode(tokenizer, "a b")
    ids = [*encode(tokenizer, "a b c")[len(query) :], tokenizer.convert_tokens_to_ids(end[-1]), *query]
    assert decode_responses(tokenizer, [query], [ids]) == [" c"]


def test_ids_without_a_token_leave_no_text(llama_path: str, byt5_path: str) -> None:
    for path in (llama_path, byt5_path):
        tokenizer = load_tokenizer(path)
        query, beyond = encode(tokenizer, "a b"), len(tokenizer) + 100
        response = encode(tokenizer, "a b c")[len(query) :]
        assert decode_responses(tokenizer, [query], [[beyond, *response, beyond]]) == [" c"]


# ------------------------------------------------------------------ EOS


@pytest.fixture
def with_files(llama_path: str, tmp_path: Path) -> Callable[..., str]:
    """Copies the tiny Llama with other values in its files."""

    def change(generation: dict[str, Any] | None = None, tokenizer: Any = None, **config: Any) -> str:
        folder = shutil.copytree(llama_path, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | config))
        (folder / "generation_config.json").unlink()
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return str(folder)

    return change


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [7, 2, 13]}, 2, (2, 7, 13)),
        ({"eos_token_id": 13}, 2, (2, 13)),
        ({"eos_token_id": 13, "_from_model_config": True}, 2, (2,)),  # the default of a class may be any token
        ({"eos_token_id": 100_000}, 2, (2,)),
        (None, [2, 13], (2, 13)),
        (None, 13, (2,)),
        (None, 1, (2, 1)),
        (None, None, (2,)),
    ],
)
def test_all_eos_ids_that_the_files_name(
    with_files: Callable[..., str], generation: dict[str, Any] | None, config: Any, ids: tuple[int, ...]
) -> None:
    assert eos_ids(load_tokenizer(with_files(generation, eos_token_id=config))) == ids


def test_the_setting_replaces_what_the_files_name(with_files: Callable[..., str]) -> None:
    path = with_files({"eos_token_id": [2, 13]})
    tokenizer = load_tokenizer(path, eos_tokens=["<s>", "</s>", "<0x0A>"])
    assert eos_ids(tokenizer) == (1, 2, tokenizer.convert_tokens_to_ids("<0x0A>"))
    assert tokenizer.eos_token == "<s>"


def test_an_eos_is_one_token_and_the_first_one_is_special(llama_path: str, model_path: str) -> None:
    with pytest.raises(UserError, match=r"model\.eos_tokens: 'User:' is \d tokens .*'▁'.* a single one"):
        load_tokenizer(llama_path, eos_tokens=["</s>", "User:"])
    with pytest.raises(UserError, match=r"model\.eos_tokens: '<0x0A>' is an ordinary token.* such as '</s>'"):
        load_tokenizer(llama_path, eos_tokens=["<0x0A>"])
    newline = encode(load_tokenizer(model_path), "\n")
    assert [*eos_ids(load_tokenizer(model_path, eos_tokens=["<|endoftext|>", "\n"]))[1:]] == newline


def test_a_tokenizer_without_eos_takes_that_of_the_setting(save_tokenizer: Callable[..., str]) -> None:
    path = save_tokenizer(eos_token=None)
    with pytest.raises(UserError, match=r"model\.eos_tokens"):
        load_tokenizer(path)
    assert load_tokenizer(path, eos_tokens=["<|endoftext|>"]).eos_token == "<|endoftext|>"


# ------------------------------------------------------------------ PAD


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        (["<|fim_middle|>", "<|fim_pad|>", "<|reserved_1|>"], "<|fim_pad|>"),
        (["<|im_start|>", "<|reserved_1|>"], "<|reserved_1|>"),
        (["<|im_start|>"], "<unk>"),
    ],
)
def test_a_pad_that_is_eos_comes_with_the_name_of_a_spare_token(
    with_files: Callable[..., str], llama_tokenizer: Any, tokens: list[str], pad: str
) -> None:
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "pad_token": "</s>"})
    path = with_files(tokenizer=tokenizer)
    with pytest.raises(UserError, match=rf"pads with its EOS.*for example '{re.escape(pad)}'"):
        load_tokenizer(path)
    assert load_tokenizer(path, pad).pad_token == pad


def test_a_pad_that_is_one_of_several_eos_is_refused(with_files: Callable[..., str], llama_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_end|>", "<|fim_pad|>"], "pad_token": "<|im_end|>"}
    )
    with pytest.raises(UserError, match=r"pads with its EOS token '<\|im_end\|>'.*for example '<\|fim_pad\|>'"):
        load_tokenizer(with_files(tokenizer=tokenizer), eos_tokens=["</s>", "<|im_end|>"])


def test_a_pad_beyond_the_embedding_comes_with_the_name_of_a_token_that_has_a_row(llama_path: str) -> None:
    tokenizer = load_tokenizer(llama_path)
    rows = tokenizer.pad_token_id
    with pytest.raises(UserError, match=r"outside the embedding.* for example '<unk>', or model\.resize_embeddings"):
        check_pad_in_embedding(tokenizer, GPTNeoXConfig(vocab_size=rows), "here")
    assert suggested_pad(tokenizer, rows + 1) == "[PAD]"


# ------------------------------------------------------------------ other kinds


@pytest.fixture
def byt5_path(tmp_path: Path) -> str:
    """Folder with a tokenizer that has no fast backend."""
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    (tmp_path / "byt5" / "config.json").write_text('{"model_type": "gpt2"}')
    return str(tmp_path / "byt5")


def test_a_tokenizer_without_a_fast_backend(byt5_path: str) -> None:
    tokenizer = load_tokenizer(byt5_path)
    assert encode(tokenizer, "é") == [0xC3 + 3, 0xA9 + 3]
    assert content(tokenizer) == content(load_tokenizer(byt5_path)) != content(ByT5Tokenizer(extra_ids=3))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is here, so the file is read")
def test_a_sentencepiece_file_names_the_package_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        UserError, match=r"model\.some_path.*no tokenizer that can be loaded.*pip install sentencepiece"
    ):
        load_tokenizer(str(tmp_path), None, SETTING)


def test_tokenizers_of_one_size_need_not_mean_the_same() -> None:
    def words(*tokens: str) -> PreTrainedTokenizerFast:
        vocabulary = {token: id_ for id_, token in enumerate(tokens)}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="?")))

    assert same_tokens(words("?", "yes", "no"), words("?", "yes", "no"))
    assert not same_tokens(words("?", "yes", "no"), words("?", "no", "yes"))


def test_texts_change_their_tokenizer_and_keep_their_eos(llama_path: str, model_path: str) -> None:
    ours, theirs = load_tokenizer(llama_path, eos_tokens=["</s>", "<0x0A>"]), load_tokenizer(model_path)
    assert not same_tokens(ours, theirs)
    assert same_tokens(theirs, load_tokenizer(model_path, "<fill>"))
    ids, newline = encode(ours, "my sister is"), ours.convert_tokens_to_ids("<0x0A>")
    found = retokenise([ids, [*ids, ours.eos_token_id], [*ids, newline]], ours, theirs)
    expected = theirs("my sister is")["input_ids"]
    assert found == [expected, [*expected, theirs.eos_token_id], [*expected, theirs.eos_token_id]]
