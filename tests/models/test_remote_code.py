"""Python code that comes with a model or tokenizer runs only if the user says so, and nobody is asked."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.models.loading import check_language_model, load_causal_lm, load_config
from rlhf.models.remote_code import VARIABLE, trust_remote_code
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_kind"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code goes to a folder of the test, nobody answers a question, and trust ends with the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked on the terminal"))
    monkeypatch.setenv(VARIABLE, "0")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def own_path(llama_path: str, tmp_path: Path) -> str:
    """A model whose classes are in its folder; importing them leaves `tmp_path / "ran"`."""
    folder = tmp_path / "own"
    load_causal_lm(llama_path).save_pretrained(folder)
    load_tokenizer(llama_path).save_pretrained(folder)
    (folder / "own_code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    _edit(folder / "config.json", model_type="own_kind", architectures=["OwnForCausalLM"], auto_map=names)
    return str(folder)


@pytest.mark.parametrize("load", [load_config, load_causal_lm, check_language_model])
def test_code_is_refused_in_one_sentence(load: Callable[[str, str], Any], own_path: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^model\.some_path: .* needs Python code .* add --trust_remote_code to run it"
    ):
        load(own_path, "model.some_path")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_code_is_refused(model_path: str, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    load_tokenizer(model_path).save_pretrained(folder)
    (folder / "own_code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    names = [None, "own_code.OwnTokenizer"]
    _edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": names})
    with pytest.raises(UserError, match=r"no tokenizer that can be loaded: .* add --trust_remote_code"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()
    trust_remote_code()
    assert type(load_tokenizer(str(folder))).__name__ == "OwnTokenizer"


def test_trusted_code_gives_a_model_and_a_reward_model(own_path: str, llama_path: str, tmp_path: Path) -> None:
    trust_remote_code()
    model = load_causal_lm(own_path)
    assert type(model).__name__ == "OwnForCausalLM"
    for name, weight in load_causal_lm(llama_path).state_dict().items():
        assert weight.equal(model.state_dict()[name])
    reward = ScalarModel.from_policy(own_path, seed=1)
    reward.save(tmp_path / "reward", load_tokenizer(own_path))
    assert reward.head_weight.equal(ScalarModel.from_pretrained(str(tmp_path / "reward"), "reward").head_weight)


def test_all_commands_take_the_setting(own_path: str, demonstration_file: str, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    words = ["fit", "--model=SFTModule", "--data=SFTDataModule", f"--model.model_path={own_path}", f"--run_dir={run}",
             f"--data.train.path={demonstration_file}", "--data.train.limit=4", "--data.batch_size=4",
             "--data.micro_batch_size=4", "--trainer.accelerator=cpu", "--trainer.devices=1"]  # fmt: skip
    generate = ["generate", f"--model={run}/export", f"--data.path={demonstration_file}", "--data.limit=2",
                f"--output={tmp_path}/table.parquet", "--response_length=2"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(words)
    assert "add --trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    main([*words, "--trust_remote_code"])
    assert "trust_remote_code: true" in (run / "config.yaml").read_text()
    os.environ[VARIABLE] = "0"
    with pytest.raises(SystemExit):  # the export is of the same kind
        main(generate)
    main([*generate, "--trust_remote_code"])
    assert (tmp_path / "table.parquet").is_file()


def test_known_types_need_no_code(model_path: str, tmp_path: Path) -> None:
    load_causal_lm(model_path).save_pretrained(tmp_path)
    (tmp_path / "own_code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    _edit(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "own_code.OwnForCausalLM"})
    assert type(load_causal_lm(str(tmp_path))).__name__ == "GPTNeoXForCausalLM"
    assert not (tmp_path / "ran").exists()
