"""A shipped config is found by its name, and what it names, from any folder; what is in the folder wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ActionConfigFile, ArgumentParser

import rlhf
from rlhf.cli.parsing import parse
from rlhf.errors import UserError
from rlhf.studies.shipped import find_config, shipped_configs


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("quickstart", "quickstart/pipeline.yaml"),
        ("ablations", "ablations/study.yaml"),
        ("quickstart/ppo.yaml", "quickstart/ppo.yaml"),
        ("configs/quickstart/ppo.yaml", "quickstart/ppo.yaml"),
    ],
)
def test_a_name_stands_for_a_shipped_file(empty: Path, name: str, file: str) -> None:
    assert Path(find_config(name)) == shipped_configs() / file


def test_what_is_in_the_folder_wins(empty: Path) -> None:
    own = empty / "configs" / "quickstart" / "pipeline.yaml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert Path(find_config("quickstart")).absolute() == own
    (empty / "quickstart").touch()
    assert find_config("quickstart") == "quickstart"


def test_an_unknown_name_lists_the_names(empty: Path) -> None:
    names = "ablations, baselines, custom, quickstart, scaling, tldr"
    with pytest.raises(UserError, match=rf"no file quikstart; .*: {names}, or"):
        find_config("quikstart")


@pytest.mark.parametrize("words", [["--config", "own.yaml"], ["--config=own.yaml"]])
def test_paths_in_a_config_lead_to_the_package(empty: Path, words: list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--model.path", type=str)
    parser.add_argument("--others", type=dict)
    Path("own.yaml").write_text(
        "model: {path: configs/quickstart/base_model}\nothers: {a: [configs/tldr, configs/nothing, quickstart]}"
    )
    config = parse(parser, words)
    assert config.model.path == str(shipped_configs() / "quickstart" / "base_model")
    assert config.others == {"a": [str(shipped_configs() / "tldr"), "configs/nothing", "quickstart"]}
    (empty / "configs" / "quickstart" / "base_model").mkdir(parents=True)
    assert parse(parser, words).model.path == "configs/quickstart/base_model"


def test_a_pipeline_from_python_finds_them_too(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"model": "configs/quickstart/base_model", "demonstrations": "none.jsonl", "ppo": False}
    with pytest.raises(UserError, match=r"sft: data.train: there is no file none.jsonl"):
        rlhf.pipeline(**own)
    # Where the model was not found, the learning rate was silently that of the paper.
    assert "a rule of thumb for a model of 0.2 million parameters" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^stages.sft.config: there is no file .*/configs/quickstart/nothing.yaml"):
        rlhf.pipeline(**own, config_dir="configs/quickstart", sft={"config": "nothing.yaml"})
