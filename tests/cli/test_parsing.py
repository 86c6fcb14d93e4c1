"""Settings that are wrong are refused in one sentence, whatever library notices."""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from jsonargparse import ActionConfigFile, ArgumentParser
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

import rlhf
import rlhf.cli.main
from rlhf.callbacks.export import Export
from rlhf.cli.main import main
from rlhf.cli.parsing import check_keys, parse
from rlhf.cli.stage import StageCLI
from rlhf.modules import StageModule

MODULE = """
from typing import TYPE_CHECKING, Annotated, Literal
from lightning.pytorch import Callback
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

if TYPE_CHECKING:
    from somewhere import Known

class Typed(Callback):
    def __init__(self, known: "Known | None" = None, number: int = 1):
        self.known = known
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
        (["--model.toy.clip=nan"], "model.toy.clip is nan: it should be a finite number."),
        (["--model.toy.value_clip=-1"], "model.toy.value_clip is -1: it should be greater than 0."),
        (["--model.toy.value_clip=nan"], "model.toy.value_clip is nan: it should be a finite number."),
        (["--model.toy.value_clip=inf"], "model.toy.value_clip is inf: it should be a finite number."),
        (["--model.toy.kind=c"], "model.toy.kind is c: it should be 'a' or 'b'."),
        (
            ["--trainer.callbacks+=rlhf.callbacks.export.Export", "--trainer.callbacks.every_n_epochs=-1"],
            "trainer.callbacks.every_n_epochs is -1: it should be greater than or equal to 0.",
        ),
        (["--trainer.callbacks+=Nope"], "trainer.callbacks: there is no class Nope; give its import path."),
        (
            ["--trainer.callbacks+=Exprt"],
            "trainer.callbacks: there is no class Exprt; give its import path. Did you mean Export?",
        ),
        (
            ["--data.train=x.csv"],
            "data.train is x.csv: it should be a group of settings; write --data.train.path x.csv.",
        ),
        (
            ["--trainer.callbacks+=Export", "--trainer.callbacks.every_n_epoch=1"],
            "trainer.callbacks: rlhf.Export: Option 'every_n_epoch' is not accepted. Did you mean every_n_epochs?",
        ),
        (
            ["--trainer.callbacks+=Export", "--trainer.callbacks.every_n_epochs=null"],
            "trainer.callbacks.every_n_epochs is null: give it a value, or leave it out.",
        ),
        (["--data.batch_size=null"], "data.batch_size is null: give it a value, or leave it out."),
        (["--model.k=null"], "model.k is null: give it a value, or leave it out."),
        ([f"--data.batch_size={2**70}"], f"data.batch_size is {2**70}: it should be at most {2**63 - 1}."),
        (
            ["--data.train.pth=x"],
            "data: rlhf.SFTDataModule: unrecognized arguments: --train.pth=x. Did you mean train.path?",
        ),
        (
            ["--model.toy.kiwi=1"],  # near to toy.kind by its prefix only
            "model: toy_module.Mine: unrecognized arguments: --toy.kiwi=1. There are model_path, toy.clip, "
            "toy.value_clip, toy.kind, k, q.",
        ),
        (
            ["--trainer.max_epoch=3"],
            "unrecognized arguments: --trainer.max_epoch=3. Did you mean trainer.max_epochs?",
        ),
        (["--run_dir="], "run_dir is empty: give it a name."),
        (["--run_dir= "], "run_dir is empty: give it a name."),
        (["--run_dir=null"], "run_dir is null: give it a name."),
        (["--seed_everything=-1"], "seed_everything is -1: it should be from 0 to 4294967295."),
        ([f"--seed_everything={2**32}"], f"seed_everything is {2**32}: it should be from 0 to 4294967295."),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val is -1: it should be finite, and 0 or more."),
        (["--trainer.gradient_clip_val=nan"], "trainer.gradient_clip_val is nan: it should be a finite number."),
        (["--trainer.gradient_clip_val=.inf"], "trainer.gradient_clip_val is inf: it should be finite, and 0 or more."),
        (["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch is 0: it should be above 0."),
        (["--trainer.val_check_interval=.nan"], "trainer.val_check_interval is nan: it should be above 0."),
        (["--trainer.log_every_n_steps=-1"], "trainer.log_every_n_steps is -1: it should be finite, and 0 or more."),
        (["--trainer.max_epochs=-2"], "trainer.max_epochs is -2: it should be finite, and -1 or more."),
        (
            ["--trainer.max_time={hours: .nan}"],
            "trainer: `Timer(duration='{hours: .nan}')` is not a valid duration. "
            "Expected a string in the format DD:HH:MM:SS.",
        ),
        (["--trainer.max_time={hours: -1}"], "trainer.max_time leaves no time to train: it should be more than 0."),
        (["--trainer.max_time={hours: 0}"], "trainer.max_time leaves no time to train: it should be more than 0."),
        (["--trainer.max_time=00:00:00:00"], "trainer.max_time leaves no time to train: it should be more than 0."),
        (["--trainer=null"], "trainer: null is neither settings (key: value) nor a file of them."),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=-1"],
            "trainer: Invalid value for every_n_train_steps=-1. Must be >= 0",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks.mode=maxx"],
            "trainer: `mode` can be min, max, got maxx",
        ),
        (
            ["--trainer.max_epochs=-1"],
            "trainer.max_epochs: this would train without end; set it, trainer.max_steps or trainer.max_time.",
        ),
        (
            ["--trainer.max_epochs=-1", "--trainer.max_time=00:01:00:00"],
            "model.optimization.schedule is cosine, which needs a length: set trainer.max_epochs, or the schedule to "
            "constant.",
        ),
        (
            ["--trainer={accelerator: cpu, devices: -1}"],  # all GPUs, where there are some
            "trainer: `devices` selected with `CPUAccelerator` should be an int > 0.",
        ),
        (
            ["--trainer.callbacks+=toy_module.Typed", "--trainer.max_epochs=-2"],
            "trainer.max_epochs is -2: it should be finite, and -1 or more.",
        ),
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
        (["--row=1"], "unrecognized arguments: --row=1. Did you mean rows?"),
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


@pytest.mark.parametrize("verb", ["command", "fit"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("rows: 1\nkind: a\nrows: 2\n", "cannot be read: the key 'rows' stands in line 1 and again in line 3."),
        ("text: {length: 1, length: 2}", "cannot be read: the key 'length' stands in line 1 and again in line 1."),
        ("PK\x03", "cannot be read: unacceptable character #x0003"),
        ("rows: &a [*a]", "cannot be read: what stands in line 1 holds itself."),
        ("kind: a\ntext: &a\n  length: *a\n", "cannot be read: what stands in line 2 holds itself."),
        ("rows: [1", "cannot be read: while parsing a flow sequence"),
        ("", "holds no settings (key: value)."),
        ("- rows", "holds no settings (key: value)."),
    ],
)
def test_a_config_that_is_none(verb: str, content: str, problem: str, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("{}")
    (tmp_path / "bad.yaml").write_text(content)
    sentence = refused(verb, f"--config={tmp_path / 'good.yaml'}", f"--config={tmp_path / 'bad.yaml'}")
    assert sentence.startswith(f"config: {tmp_path / 'bad.yaml'} {problem}")


@pytest.mark.parametrize("form", ["--texts=[{{length: 3}}]", "--texts={}.yaml", "--config={}_too.yaml"])
def test_a_list_replaces_a_list(form: str, tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_function_arguments(command, sub_configs=True)
    (tmp_path / "before.yaml").write_text("texts: [{length: 2, share: 0.5}]")
    (tmp_path / "list.yaml").write_text("[{length: 3}]")
    (tmp_path / "list_too.yaml").write_text("texts: [{length: 3}]")
    words = [f"--config={tmp_path / 'before.yaml'}", form.format(tmp_path / "list")]
    (text,) = parse(parser, words).texts
    assert (text.length, text.share) == (3, 1.0)


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": 2}',
        b'{"a": "caf\xe9"}',
        b'[{"a": 1, "a": 2}]',
        b"",
        b"a,b\n1,2\n",
        b"a\tb\nc\td\n",
        b"length: 2",
    ],
)
def test_a_file_of_records_is_no_config(content: bytes, tmp_path: Path) -> None:
    def learn(records: str | Text) -> None:
        """A command with data."""

    (tmp_path / "records.jsonl").write_bytes(content)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(learn, sub_configs=True)
    assert parse(parser, [f"--records={tmp_path}/records.jsonl"]).records == str(tmp_path / "records.jsonl")


def test_what_an_alias_leads_to_again_is_no_fault() -> None:
    check_keys("a: &a {b: [1, 2]}\nc: [*a, *a]\nd: *a\n")


def test_a_length_that_is_for_training_only(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageCLI, "_run_subcommand", lambda self, verb: None)
    for verb in ("validate", "test", "predict"):
        StageCLI.run([
            verb, "--model=SFTModule", f"--model.model_path={model_path}", "--data=SFTDataModule",
            "--data.train.path=x.jsonl", f"--run_dir={tmp_path / verb}", "--trainer.max_epochs=-1",
        ])  # fmt: skip


def test_an_appended_callback_leaves_the_others(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Export])
    words = ["--callbacks=[{class_path: rlhf.Export, init_args: {every_n_epochs: 3}}]"]
    words += ["--callbacks+=rlhf.Export", "--callbacks.best=validation/score"]
    first, second = parse(parser, words).callbacks
    assert (first.init_args.every_n_epochs, first.init_args.best) == (3, None)
    assert (second.init_args.every_n_epochs, second.init_args.best) == (0, "validation/score")


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
