"""Every model is sampled as plain forwards of single rows say, by the fastest way that is right for it, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from rlhf.errors import UserError
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling import paths
from rlhf.sampling.paths import fault_of, reader_for
from rlhf.sampling.sampler import Decoding, choose, sample, uniforms
from rlhf.sampling.token_readers import KeyValueReader, Reader, StateReader, WholeReader

PAD, EOS, ENDS = 10_000, 7, (0, 7)
SHAPE = {
    "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MINIMAX = {
    "layer_types": ["linear_attention", "full_attention"],
    "block_size": 4,
    "num_local_experts": 2,
    "head_dim": 16,
}
KINDS: dict[str, tuple[dict[str, Any], type[Reader]]] = {
    "gpt_neox": ({}, KeyValueReader),
    "gpt2": ({}, KeyValueReader),
    "llama": ({}, KeyValueReader),
    "mistral": ({"sliding_window": 4}, KeyValueReader),
    "bloom": ({}, KeyValueReader),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 1}, KeyValueReader),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, KeyValueReader),
    "mamba": ({"state_size": 8}, StateReader),
    "minimax": (MINIMAX, StateReader),
    "rwkv": ({"attention_hidden_size": 32}, WholeReader),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 2}, WholeReader),
}  # fmt: skip
QUERIES = [[3, 4, 5, EOS, 8, 9, 10], [11, 12], [13], [14, 15, 16], [3, 17, 18, 19, 20], [21, 22]]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    paths._readers.clear()


def tiny(kind: str) -> Any:
    """Weights so large that contexts matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | KINDS[kind][0]))
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.endswith("A_log"):
                torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


@torch.no_grad()
def one_token_after_another(model: Any, query: list[int], numbers: Tensor, temperature: float) -> list[int]:
    """A response by plain forwards of one row."""
    tokens = list(query)
    for step in range(numbers.shape[1]):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1]
        tokens.append(int(choose(logits / temperature, numbers[:, step])))
        if tokens[-1] in ENDS:
            break
    return tokens[len(query) :]


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_those_of_single_rows_in_plain_forwards(kind: str) -> None:
    model, steps = tiny(kind), 14
    assert reader_for(model) is KINDS[kind][1]
    numbers = uniforms(len(QUERIES), steps, torch.Generator().manual_seed(5)).to(model.device)
    together = sample(model, *pad_sequences(QUERIES, PAD, "left"), numbers, Decoding(1.5, ENDS, PAD))
    alone = [one_token_after_another(model, query, numbers[[n]], 1.5) for n, query in enumerate(QUERIES)]
    assert len({len(row) for row in alone}) > 2
    assert together.tolist() == pad_sequences(alone, PAD)[0].tolist()


# ---------------------------------------------------------------------------------------------- models that are broken


def breaks(name: str) -> type[Any]:
    """A Llama whose forward changes one input before it is used."""

    class Broken(LlamaForCausalLM):
        def forward(  # type: ignore[no-untyped-def]
            self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, logits_to_keep=0, **more
        ):
            given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
            given = {key: value for key, value in given.items() if key != name}
            return super().forward(input_ids, logits_to_keep=logits_to_keep, **given, **more)

    return Broken


def broken(name: str, std: float = 0.2, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny("llama")
    model.__class__ = breaks(name)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data *= std / 0.2
    return model.to(dtype)


FAULTS = {"attention_mask": StateReader, "past_key_values": WholeReader}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize(("std", "dtype"), [(0.2, torch.float32), (1e-3, torch.float32), (0.2, torch.bfloat16)])
def test_a_model_that_ignores_what_it_is_given_is_noticed(name: str, std: float, dtype: torch.dtype) -> None:
    """Also where all logits are nearly the same, so that a wrong cache changes them by next to nothing."""
    assert reader_for(broken("nothing", std, dtype)) is KeyValueReader
    assert reader_for(broken(name, std, dtype)) is FAULTS[name]


def test_sampling_a_model_that_ignores_padding_is_right(device: str) -> None:
    numbers = uniforms(len(QUERIES), 10, torch.Generator().manual_seed(5)).to(device)
    inputs = (*pad_sequences(QUERIES, PAD, "left"), numbers, Decoding(1.5, ENDS, PAD))
    assert torch.equal(sample(broken("attention_mask"), *inputs), sample(broken("nothing"), *inputs))


def test_tokens_that_a_model_never_predicts_do_not_matter() -> None:
    model = tiny("gpt2")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(2, torch.tensor([5, 6]), -torch.inf))
    assert reader_for(model) is KeyValueReader


@pytest.mark.parametrize("reader", [KeyValueReader, StateReader, WholeReader])
def test_a_row_that_goes_on_as_another_is_noticed(reader: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    assert fault_of(model, reader) is None
    keep = reader.keep
    monkeypatch.setattr(reader, "keep", lambda self, rows: keep(self, 1 - rows))
    assert fault_of(model, reader) is not None


@pytest.mark.parametrize("kind", ["gpt_neox", "mamba"])
def test_a_way_that_fails_under_autocast_alone_is_not_taken(
    kind: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    model = tiny(kind)
    fast: Any = reader_for(model)
    read = fast.read

    def fail(self: Any, tokens: Tensor) -> Tensor:
        if torch.is_autocast_enabled(device):
            raise TypeError("expected another precision")
        return read(self, tokens)

    paths._readers.clear()
    with torch.autocast(device, torch.bfloat16):
        assert reader_for(model) is fast
        paths._readers.clear()
        monkeypatch.setattr(fast, "read", fail)
        assert reader_for(model) not in (fast, KeyValueReader)
    paths._readers.clear()
    assert reader_for(model) is fast


def test_autocast_hides_no_fault_of_float32_weights(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    model, read = tiny("gpt_neox"), KeyValueReader.read
    monkeypatch.setattr(KeyValueReader, "read", lambda self, tokens: read(self, tokens) * 1.01)
    with torch.autocast(device, torch.bfloat16):
        assert fault_of(model, KeyValueReader) is not None


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = AutoConfig.for_model("bert-generation", **SHAPE, is_decoder=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config._name_or_path = "some/folder"
    numbers = uniforms(1, 4, torch.Generator()).to(model.device)
    with pytest.raises(UserError, match=r"some/folder .BertGenerationDecoder. works in no stage.* logits"):
        sample(model, *pad_sequences([[3, 4]], PAD, "left"), numbers, Decoding(1.0, ENDS, PAD))


def test_a_model_whose_forward_fails_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    monkeypatch.setattr(type(model.transformer), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"no stage.* fails with ZeroDivisionError: division by zero"):
        reader_for(model)


# ------------------------------------------------------------------------------------------------------ the test itself


def test_a_model_is_tested_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[type[Reader]] = []
    fault = paths.fault_of
    monkeypatch.setattr(paths, "fault_of", lambda model, reader: tested.append(reader) or fault(model, reader))
    model = tiny("mamba").train()
    random = torch.get_rng_state()
    for _ in range(2):
        numbers = uniforms(2, 3, torch.Generator()).to(model.device)
        sample(model, *pad_sequences([[3, 4], [5]], PAD, "left"), numbers, Decoding(1.0, ENDS, PAD))
    assert tested == [KeyValueReader, StateReader]
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(("kind", "says"), [("gpt2", None), ("mamba", "token by token"), ("openai-gpt", "no cache")])
def test_a_slower_way_is_announced_once(kind: str, says: str | None, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(kind)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        reader_for(model)
        reader_for(model)
    messages = [record.message for record in caplog.records if "slower way" in record.message]
    assert len(messages) == (says is not None)
    assert all(type(model).__name__ in message and str(says) in message for message in messages)


def test_weights_shared_out_by_zero3_are_not_tested() -> None:
    model = broken("past_key_values")
    model.get_input_embeddings().weight.ds_id = 3
    assert reader_for(model) is KeyValueReader


@pytest.mark.parametrize("kind", ["mamba", "minimax"])
def test_rows_that_have_ended_are_no_longer_in_the_batch_where_a_state_can_lose_them(kind: str) -> None:
    """The state of mamba loses rows, that of minimax does not."""
    model, rows = tiny(kind), []
    model.register_forward_pre_hook(lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    reader_for(model)
    rows.clear()
    numbers = uniforms(len(QUERIES), 14, torch.Generator().manual_seed(5)).to(model.device)
    sample(model, *pad_sequences(QUERIES, PAD, "left"), numbers, Decoding(1.5, ENDS, PAD))
    assert (min(rows) < len(QUERIES)) == (kind == "mamba")
