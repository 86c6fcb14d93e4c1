"""Every fenced block of README and docs is run, in order, in a folder like a clone that has seen a short quickstart.

A comment on the line before a fence says what is special about a block:

    <!-- not run: WHY -->         its commands are only parsed, with all their configs and settings
    <!-- tested by: FILE -->      another test runs it
    <!-- exits with 2 -->         its command fails
    <!-- printed -->              the command before has printed these lines

A block whose first line is a comment with a file name, `# report.yaml`, is that file for the blocks after it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf.cli.main import STAGE_VERBS, VERBS, main, parsed
from rlhf.cli.parsing import split_words
from rlhf.studies.recipe import SECTIONS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCED = re.compile(r"(?:<!-- ([^\n]*?) -->\n)?^( *)```([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SHOWN = {"", "text", "bibtex", "math"}  # languages of what is only to be read
COMMAND = re.compile(r"^\s*(\$ |python3? |pip |rlhf |torchrun |import |from \w+ import )", re.MULTILINE)
FEW = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
SHORTER = {  # what is added to the commands of the docs, so that they take seconds
    "fit": [f"--{setting}" for setting in FEW],
    "pipeline": [
        *(f"--{stage}.{setting}" for stage in ("sft", "reward", "ppo") for setting in FEW),
        *(f"--ppo.data.{kind}batch_size=16" for kind in ("", "micro_", "rollout_")),
    ],
}
SHORTER["check pipeline"] = SHORTER["pipeline"][-3:]
SMALL = {"train": 256, "validation": 64, "comparisons": 64, "comparisons_validation": 64, "comparisons_news": 8}


class Block(NamedTuple):
    """A fenced block, and the comment before it."""

    line: int
    mark: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    found = [
        Block(text.count("\n", 0, m.start()) + 1, m[1] or "", m[3].strip(), textwrap.dedent(m[4]))
        for m in FENCED.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), "a fence is not closed"
    return found


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every command, without variables before it."""
    for command in re.split(r"\n|&&|;", text.replace("\\\n", " ")):
        words = shlex.split(command, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


def words_of_ours(command: list[str]) -> list[str] | None:
    """The words for `main`, if the command is one of this package."""
    if command[0] == "rlhf":
        return command[1:]
    return command[command.index("train.py") + 1 :] if "train.py" in command else None


def parse(words: list[str]) -> None:
    """Parses a command of this package with its configs."""
    if words[0] in STAGE_VERBS and words[:2] != ["check", "pipeline"]:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*words, "--print_config"])
        return
    verb, given = ("pipeline", words[2:]) if words[0] == "check" else (words[0], words[1:])
    given = [word if word != "--watch" else "--watch=true" for word in given]  # as `main` does it
    if verb == "pipeline":
        given, _ = split_words(given, [*SECTIONS, "judge"])
    parsed(getattr(importlib.import_module(VERBS[verb][0]), verb), given)


class ParsedError(Exception):
    """A script has parsed its command line."""


def parse_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a script, one of the benchmarks, parse its command line, and stops it there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: Any, *args: Any) -> None:
        original(self, *args)
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str(ROOT / Path(words[0]).parent))
        patch.syspath_prepend(str(ROOT))
        with pytest.raises(ParsedError):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a command in this process and returns its exit status."""
    ours = words_of_ours(words)
    if ours is None:
        assert words[:2] == ["python", "-m"], f"mark the block: {shlex.join(words)} is not run"
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
        return 0
    try:
        shorter = SHORTER.get(" ".join(ours[: 1 + (ours[0] == "check")]), [])
        alone = "--prompts" in ours and "--demonstrations" not in ours  # PPO is the only stage
        main([*ours, *(word for word in shorter if not alone or word.startswith("--ppo"))])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, in_this_process: Callable[..., Any]) -> Path:
    """The run folder of a quickstart with little data and few updates."""
    clone = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        like_a_clone(clone, patch)
        in_this_process(patch)
        sizes = f"--synthesize.sizes={json.dumps(SMALL | {'pretraining': 0})}"
        main(["pipeline", "--config=configs/quickstart/pipeline.yaml", sizes, *SHORTER["pipeline"]])
    return clone / "runs" / "quickstart"


def like_a_clone(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes a folder look like a clone and works in it."""
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "configs" / "quickstart" / "sft.yaml", folder / "my.yaml")
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))


class Reader:
    """Does what a page says, block after block."""

    def __init__(self, patch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capfd = patch, capfd
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""

    def read(self, block: Block) -> None:
        """Runs or checks one block."""
        kind, _, rest = block.mark.partition(": ")
        if kind == "tested by":
            assert (ROOT / rest).is_file()
        elif block.language in SHOWN:
            assert not COMMAND.search(block.text), "name the language of the block"
            if kind == "printed":
                missing = [line for line in block.text.splitlines() if line.strip() not in self.printed]
                assert not missing, self.printed[-3000:]
        else:
            first = re.match(r"# ([\w/]+\.\w+)\n", block.text)
            if first:
                Path(first[1]).write_text(block.text)
            getattr(self, block.language)(block.text, kind == "not run", block.mark)

    def bash(self, text: str, only_parsed: bool, mark: str) -> None:
        """Runs commands, or parses those of this package."""
        expected = int(mark.removeprefix("exits with ")) if mark.startswith("exits with ") else 0
        for words in commands_of(text):
            if only_parsed:
                self.parse(words)
                continue
            self.capfd.readouterr()
            status = run(words, self.patch)
            self.printed = "".join(self.capfd.readouterr())
            assert status == expected, self.printed[-3000:]

    def parse(self, words: list[str]) -> None:
        """Parses a command that is not run."""
        ours = words_of_ours(words)
        if ours is not None:
            parse(ours)
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            parse_script(words[1:], self.patch)

    def python(self, text: str, only_parsed: bool, mark: str) -> None:
        """Runs code after that of the blocks before it."""
        code = compile(text, "page", "exec", dont_inherit=True)
        if not only_parsed:
            exec(code, self.names)

    def yaml(self, text: str, only_parsed: bool, mark: str) -> None:
        """Adds settings of a stage to those of the quickstart's, or reads what belongs to other commands."""
        if set(yaml.safe_load(text)) <= {"trainer", "model", "data"}:
            Path("block.yaml").write_text(text)
            parse(["fit", "--config=configs/quickstart/sft.yaml", "--config=block.yaml"])

    def jinja(self, text: str, only_parsed: bool, mark: str) -> None:
        """Renders a chat template."""
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(text)
        rendered = template.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
        assert all(message["content"] in rendered for message in messages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page(
    page: Path,
    commands: list[list[str]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    blocks = blocks_of(page)
    if any(block.language in {"bash", "python"} and not block.mark.startswith("not run") for block in blocks):
        quickstart = request.getfixturevalue("quickstart")
        shutil.copytree(quickstart, tmp_path / "runs" / "quickstart", symlinks=True)
    like_a_clone(tmp_path, monkeypatch)
    reader = Reader(monkeypatch, capfd)
    for block in blocks:
        try:
            reader.read(block)
        except BaseException as error:
            error.add_note(f"{page.relative_to(ROOT)}:{block.line}")
            raise
    for file in tmp_path.glob("my_*.py"):
        sys.modules.pop(file.stem, None)
