"""Settings that are wrong are refused in one sentence, whatever library notices."""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from jsonargparse import ArgumentParser
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

import rlhf
import rlhf.cli.main
from rlhf.cli.main import main
from rlhf.cli.parsing import parse
from rlhf.modules import StageModule

MODULE = """
from typing import Annotated, Literal
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from rlhf.modules import SFTModule

@dataclass(frozen=True, config=ConfigDict(title="model.toy"))
class Toy:
    clip: PositiveFloat = 0.2
    value_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.2
    kind: Literal["a", "b"] = "a"

class Mine(SFTModule):
    def __init__(self, model_path: str, toy: Toy = Toy(), k: PositiveInt = 3, q: PositiveInt | Literal["auto"] = 3):
        super().__init__(model_path)
"""


@dataclass(frozen=True, config=ConfigDict(title="text"))
class Text:
    """Settings with two numbers."""

    length: PositiveInt = 1
    share: Annotated[float, Field(ge=0, le=1)] = 1.0


def command(
    rows: PositiveInt = 1, text: Text = Text(), texts: list[Text] | None = None, kind: Literal["a"] = "a"
) -> None:
    """A command of its own."""


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the one sentence that a command line is refused with."""
    module = ModuleType("with_a_command")
    monkeypatch.setattr(module, "command", command, raising=False)
    monkeypatch.setitem(sys.modules, "with_a_command", module)
    monkeypatch.setitem(rlhf.cli.main.VERBS, "command", ("with_a_command", ""))

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(words)
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    return refused


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.k=0"], "model.k is 0: it should be greater than 0."),
        (["--model.k=1.5"], "model.k is 1.5: it should be a valid integer."),
        (["--model.q=0"], "model.q is 0: it should be greater than 0 or 'auto'."),
        (["--model.q=x"], "model.q is x: it should be a valid integer or 'auto'."),
        (["--model.toy.clip=0"], "model.toy.clip is 0.0: it should be greater than 0."),
        (["--model.toy.clip=.nan"], "model.toy.clip is nan: it should be greater than 0."),
        (["--model.toy.clip=nan"], "model.toy.clip is nan: it should be of type float."),
        (["--model.toy.value_clip=-1"], "model.toy.value_clip is -1: it should be greater than 0."),
        (["--model.toy.value_clip=nan"], "model.toy.value_clip is nan: it should be a finite number."),
        (["--model.toy.value_clip=inf"], "model.toy.value_clip is inf: it should be a finite number."),
        (["--model.toy.kind=c"], "model.toy.kind is c: it should be 'a' or 'b'."),
        (
            ["--trainer.callbacks+=rlhf.callbacks.export.Export", "--trainer.callbacks.every_n_epochs=-1"],
            "trainer.callbacks.every_n_epochs is -1: it should be greater than or equal to 0.",
        ),
        (["--trainer.callbacks+=Nope"], "trainer.callbacks: there is no class Nope; give its import path."),
    ],
)
def test_of_a_stage(
    words: list[str], sentence: str, refused: Any, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    given = ["--model=toy_module.Mine", f"--model.model_path={model_path}", "--data=SFTDataModule"]
    assert refused("fit", *given, "--data.train.path=x.jsonl", *words) == sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rows=0"], "rows is 0: it should be greater than 0."),
        (["--rows=x"], "rows is x: it should be a valid integer."),
        (["--kind=b"], "kind is b: it should be 'a'."),
        (["--text.length=0"], "text.length is 0: it should be greater than 0."),
        (
            ["--text={length: 0, share: -1}"],
            "text.length is 0: it should be greater than 0; "
            "text.share is -1.0: it should be greater than or equal to 0.",
        ),
        (["--text.share=2"], "text.share is 2.0: it should be less than or equal to 1."),
        (["--texts=[{length: 0}]"], "text.length is 0: it should be greater than 0."),
        (["--texts=nowhere.yaml"], "texts: there is no file nowhere.yaml."),
        (["--nothing=1"], "unrecognized arguments: --nothing=1."),
    ],
)
def test_of_a_command(words: list[str], sentence: str, refused: Any) -> None:
    assert refused("command", *words) == sentence


@pytest.mark.parametrize("verb", ["command", "fit"])
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
@pytest.mark.parametrize(
    ("content", "byte"), [(b"rows: 1\n# caf\xe9\n", "0xe9 at 13"), (b"PK\x03\x04\xff\x00", "0xff at 4")]
)
def test_a_config_that_is_no_text(
    verb: str, form: str, content: bytes, byte: str, refused: Any, tmp_path: Path
) -> None:
    (tmp_path / "good.yaml").write_text("{}")
    (tmp_path / "bad.yaml").write_bytes(content)
    words = [f"--config={tmp_path / 'good.yaml'}", *form.format(tmp_path / "bad.yaml").split()]
    assert (
        refused(verb, *words) == f"config: {tmp_path / 'bad.yaml'} is no text in UTF-8 (byte {byte}); is it a config?"
    )


def test_constraints_reach_the_parser() -> None:
    """jsonargparse reads no constraint of a postponed annotation: a file with such arguments does not postpone them."""
    constrained = re.compile(r"\b(Annotated|(Positive|NonNegative)(Int|Float)?)\b")
    for file in Path(rlhf.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        if any(ast.unparse(node) == "from __future__ import annotations" for node in tree.body):
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            arguments = [argument for node in functions for argument in [*node.args.args, *node.args.kwonlyargs]]
            hints = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
            assert not [hint for hint in hints if constrained.search(hint)], file


@pytest.mark.parametrize("setting", ["ppo.missing_eos_score", "ppo.value_clip", "reward_path"])
def test_null_can_be_typed(setting: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(StageModule, "model")
    found = parse(parser, ["--model=PPOModule", "--model.model_path=x", f"--model.{setting}=null"])
    assert found[f"model.init_args.{setting}"] is None
