"""Weights are those that config.json describes, all of them, finite, and nothing in their files is run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import UserError
from rlhf.models.loading import SHIFT, load_causal_lm
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer

FILE = "model.safetensors"
Change = Callable[..., str]


@pytest.fixture
def changed(llama_path: str, tmp_path: Path) -> Change:
    """Makes a copy of a model with other weights or settings, in a file of this name."""

    def change(edit: Callable[[dict[str, Any]], Any] = dict, name: str = FILE, **config: Any) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(llama_path, folder)
        weights = load_file(folder / FILE)
        edit(weights)
        (folder / FILE).unlink()
        save_file(weights, folder / name, {"format": "pt"}) if name == FILE else torch.save(weights, folder / name)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return str(folder)

    return change


@pytest.fixture(params=["policy", "head"])
def load(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Loads a language model as such, or as the start of a reward model."""
    return load_causal_lm if request.param == "policy" else lambda path: ScalarModel.from_policy(path, 1)


def test_fewer_layers_than_there_are_weights(changed: Change, load: Callable[[str], Any]) -> None:
    path = changed(num_hidden_layers=1)
    with pytest.raises(UserError, match=r"^model\.model_path: .* no place for 9 of them, first model\.layers\.1\."):
        load(path)


def test_a_bias_that_the_model_would_leave_out(changed: Change, load: Callable[[str], Any]) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(UserError, match=rf"no place for 1 of them, first {name}"):
        load(changed(lambda weights: weights.update({name: torch.ones(32)})))


@pytest.mark.parametrize("file", [FILE, "pytorch_model.bin"])
def test_a_bias_of_zeros_is_none(file: str, changed: Change) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.warns(UserWarning, match=rf"1 weights of .* belong to no part of the model, first {name}"):
        load_causal_lm(changed(lambda weights: weights.update({name: torch.zeros(32)}), file))


def test_names_of_a_file_are_those_of_the_model(model_path: str, tmp_path: Path) -> None:
    """GPT-NeoX calls its output layer `lm_head`, and in its files `embed_out`."""
    folder = shutil.copytree(model_path, tmp_path / "changed")
    weights = load_file(folder / FILE)
    (output,) = (name for name in weights if name.startswith("embed_out"))
    save_file(weights | {"embed_out.bias": torch.zeros(len(weights[output]))}, folder / FILE, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 weights of .* belong to no part of the model, first lm_head\.bias"):
        load_causal_lm(str(folder))
    save_file(weights | {output: weights[output].to(torch.int8)}, folder / FILE, {"format": "pt"})
    with pytest.raises(UserError, match=rf"are integers, .*: {output} is I8\.$"):
        load_causal_lm(str(folder))


def test_weights_of_another_shape(changed: Change, load: Callable[[str], Any]) -> None:
    problem = r"its config\.json: model\.layers\.0\.mlp\.down_proj\.weight has the shape \(32, 64\), not \(32, 48\)\.$"
    with pytest.raises(UserError, match=rf"^model\.model_path: the weights of .* do not fit {problem}"):
        load(changed(intermediate_size=48))


def test_a_config_with_nan_is_not_blamed_on_the_type(changed: Change, load: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match=r"^model\.model_path: .* computes NaN or infinity .* in its config\.json"):
        load(changed(rms_norm_eps=float("nan")))


def test_a_part_that_is_no_part_of_the_model_is_named(changed: Change) -> None:
    with pytest.warns(UserWarning, match=r"1 weights of .* belong to no part of the model, first v_head\.weight"):
        load_causal_lm(changed(lambda weights: weights.update({"v_head.weight": torch.ones(1, 32)})))


@pytest.mark.filterwarnings("error")
def test_what_types_stored_once_is_no_fault(model_path: str, tmp_path: Path) -> None:
    """transformers knows what its classes have stopped to store, such as masks."""
    folder = shutil.copytree(model_path, tmp_path / "old")
    weights = load_file(folder / FILE)
    masks = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    rotary = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | masks | rotary, folder / FILE, {"format": "pt"})
    load_causal_lm(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(
    value: float, dtype: torch.dtype, changed: Change, load: Callable[[str], Any]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def edit(weights: dict[str, Any]) -> None:
        weights |= {n: w.to(dtype) for n, w in weights.items()}
        weights[name][3, 5] = value

    with pytest.raises(UserError, match=r"^model\.model_path: .* not finite: there is NaN or infinity in .*up_proj"):
        load(changed(edit))


@pytest.mark.parametrize("part", ["score.weight", "model.norm.weight"])
def test_a_reward_model_that_is_not_finite(part: str, llama_path: str, tmp_path: Path) -> None:
    ScalarModel.from_policy(llama_path, 1).save(tmp_path, load_tokenizer(llama_path))
    weights = load_file(tmp_path / FILE)
    weights[part].view(-1)[-1] = float("nan")
    save_file(weights, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^reward: .* not finite: .* in {part}"):
        ScalarModel.from_pretrained(str(tmp_path), "reward")


@pytest.mark.parametrize("name", [FILE, "pytorch_model.bin"])
def test_integers_are_no_weights(name: str, changed: Change, load: Callable[[str], Any]) -> None:
    def edit(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(64, 32, dtype=torch.int8)

    with pytest.raises(UserError, match=r"^model\.model_path: .* are integers, .* model\.layers\.1\.mlp\.up_proj"):
        load(changed(edit, name))


class Marks:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_in_a_file_of_weights_is_run(changed: Change, load: Callable[[str], Any], tmp_path: Path) -> None:
    path = changed(lambda weights: weights.update(x=Marks(tmp_path / "ran")), "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model\.model_path: the model .* would run posix\.mkdir, so it is not read"):
        load(path)
    assert not (tmp_path / "ran").exists()


def _broken(folder: Path) -> Iterator[Callable[[], Any]]:
    file = folder / FILE
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    yield lambda: file.write_bytes(file.read_bytes()[:-100])
    yield lambda: file.write_bytes(b"")
    yield lambda: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    yield lambda: (file.unlink(), (folder / f"{FILE}.index.json").write_text(json.dumps(index)))
    yield lambda: (file.unlink(), (folder / f"{FILE}.index.json").write_text("{"))
    yield lambda: (file.unlink(), (folder / f"{FILE}.index.json").write_text("{}"))
    yield lambda: (file.unlink(), (folder / "pytorch_model.bin").write_bytes(b"no pickle"))
    yield lambda: (file.unlink(), torch.save([1], folder / "pytorch_model.bin"))
    yield lambda: (file.unlink(), torch.save({"a": 1}, folder / "pytorch_model.bin"))
    yield lambda: (folder / "config.json").write_text("[]")
    yield lambda: (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    yield lambda: (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "many"}')
    yield lambda: (folder / "config.json").write_text('{"model_type": ["llama"]}')
    yield lambda: (folder / "config.json").write_text('{"model_type": "t5"}')
    yield lambda: (folder / "generation_config.json").write_text("[]")
    yield lambda: (folder / "tokenizer.json").write_text("{}")
    yield lambda: (folder / "tokenizer.json").write_bytes(b"")
    yield lambda: (folder / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize("number", range(len([*_broken(Path())])))
def test_a_broken_file_is_one_sentence(number: int, changed: Change, load: Callable[[str], Any]) -> None:
    path = changed()
    [*_broken(Path(path))][number]()
    with pytest.raises(UserError, match=rf"^(model\.model_path: |{path}/).*\.$") as caught:
        (load_tokenizer(path), load(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shift", ["a text", None, float("nan"), [1.0]])
def test_the_shift_of_a_reward_model_is_a_number(shift: Any, reward_path: str) -> None:
    file = Path(reward_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {SHIFT: shift}))
    with pytest.raises(UserError, match=rf"^reward: {SHIFT} in the config\.json of .* is .*, not a number"):
        ScalarModel.from_pretrained(reward_path, "reward")
