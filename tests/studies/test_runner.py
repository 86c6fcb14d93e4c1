"""What a pipeline makes again: a failed start, other settings, `redo`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.studies.processes import Ended, stage_processes
from rlhf.studies.runner import Runner, Stage

STAGES = [
    Stage("sft"),
    Stage("reward", takes={"model.model_path": "{run}/sft/export"}),
    Stage("responses", "generate", takes={"model": "{run}/sft/export"}),
    Stage("ppo", takes={"model.model_path": "{run}/sft/export", "model.reward_path": "{run}/reward/export"}),
]


@pytest.fixture
def product() -> dict[str, str]:
    """What a training stage writes: a file of its folder for each name; by default its export. It then fails if not."""
    return {}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, product: dict[str, str]) -> list[str]:
    """Pretended stages; the names of their places, with `, resumed`."""
    names: list[str] = []

    def run(words: list[str], log: Path | None) -> Ended:
        place = Path(next(w.partition("=")[2] for w in words if w.startswith(("--run_dir=", "--output="))))
        names.append(place.stem + (", resumed" if words[-1] == "last" else ""))
        written = product.get(place.stem, "export/rlhf.json")
        file = place / written if words[0] == "fit" else place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(len(names)))
        return Ended(int("export" not in written), 0.0, 0.0)

    monkeypatch.setattr(stage_processes, "run", run)
    return names


def run(folder: Path, *redo: str, arguments: tuple[str, ...] = (), stages: list[Stage] = STAGES) -> None:
    with Runner(folder / "run", folder, arguments=arguments, redo=redo) as runner:
        runner.prepare(stages)
        for stage in stages:
            runner.run_stage(stage)
        runner.finish()


@pytest.mark.parametrize("left", ["config.yaml", "tensorboard/events"])
def test_a_failed_start_takes_other_settings(
    left: str, seen: list[str], product: dict[str, str], tmp_path: Path
) -> None:
    product["reward"] = left
    with pytest.raises(UserError, match="the stage reward ended with status 1"):
        run(tmp_path)
    product.clear()
    changed = [STAGES[0], Stage("reward", takes=STAGES[1].takes | {"data.limit": 3}), *STAGES[2:]]
    run(tmp_path, stages=changed)
    assert seen == ["sft", "reward", "reward", "responses", "ppo"]


def test_a_checkpoint_is_not_given_up_without_a_word(seen: list[str], product: dict[str, str], tmp_path: Path) -> None:
    product["sft"] = "checkpoints/last.ckpt"
    with pytest.raises(UserError):
        run(tmp_path)
    with pytest.raises(UserError, match=r"holds results of sft with other settings .* move aside with --redo sft to"):
        run(tmp_path, arguments=("--x=1",))
    product.clear()
    run(tmp_path)
    assert seen == ["sft", "sft, resumed", "reward", "responses", "ppo"]


def test_other_settings_name_every_stage_before_any_runs(seen: list[str], tmp_path: Path) -> None:
    run(tmp_path)
    seen.clear()
    for changed in (["sft"], ["sft", "ppo"]):
        stages = [Stage(s.name, s.command, takes=s.takes | {"n": 1} if s.name in changed else s.takes) for s in STAGES]
        with pytest.raises(UserError, match=r"results of sft, reward, ppo with .* --redo sft reward ppo to make"):
            run(tmp_path, stages=stages)
        assert seen == []


def test_redo_makes_a_stage_again_with_all_that_is_made_from_it(
    seen: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    run(tmp_path)
    assert seen == ["sft", "reward", "responses", "ppo"]
    run(tmp_path, "reward")
    assert seen[4:] == ["reward", "ppo"]
    folder = tmp_path / "run"
    assert f"redo: {folder}/ppo is now {folder}/ppo.1" in capsys.readouterr().out
    run(tmp_path, "sft", arguments=("--x=1",))  # with other settings, too
    assert seen[6:] == ["sft", "reward", "responses", "ppo"]
    kept = {path.relative_to(folder): path.read_text() for path in folder.rglob("rlhf.json")}
    assert {str(path.parent.parent): text for path, text in kept.items()} == {
        "sft": "7", "sft.1": "1", "reward": "8", "reward.1": "2", "reward.2": "5", "ppo": "10", "ppo.1": "4",
        "ppo.2": "6",
    }  # fmt: skip
    assert (folder / "responses.1.parquet").read_text() == "3"
    run(tmp_path, arguments=("--x=1",))
    assert len(seen) == 10


@pytest.mark.parametrize("again", [[], ["sft"]])
def test_redo_that_was_stopped_goes_on_with_the_same_command_or_without_redo(
    again: list[str], seen: list[str], product: dict[str, str], tmp_path: Path
) -> None:
    run(tmp_path)
    product["sft"] = "checkpoints/last.ckpt"
    with pytest.raises(UserError, match="the same command resumes it"):
        run(tmp_path, "sft")
    product.clear()
    run(tmp_path, *again)
    assert seen[4:] == ["sft", "sft, resumed", "reward", "responses", "ppo"]
    seen.clear()
    run(tmp_path, "sft")  # a new time
    assert seen == ["sft", "reward", "responses", "ppo"]


def test_redo_of_an_unknown_stage_is_refused(seen: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="redo: there is no stage 'stf'; the stages are sft, reward, responses, ppo"):
        run(tmp_path, "stf")


def test_a_run_that_the_pipeline_did_not_start_is_kept(seen: list[str], tmp_path: Path) -> None:
    export = tmp_path / "run" / "sft" / "export" / "rlhf.json"
    export.parent.mkdir(parents=True)
    export.touch()
    with pytest.raises(UserError, match="holds results of sft with other settings"):
        run(tmp_path)
    run(tmp_path, "sft")
    assert (tmp_path / "run" / "sft.1" / "export").is_dir()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_finished_stage_whose_export_was_deleted_is_run_again(
    checkpoint: bool, seen: list[str], tmp_path: Path
) -> None:
    run(tmp_path)
    seen.clear()
    shutil.rmtree(tmp_path / "run" / "sft" / "export")
    if checkpoint:
        (tmp_path / "run" / "sft" / "checkpoints").mkdir()
        (tmp_path / "run" / "sft" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="results of reward, ppo with other settings or from other exports"):
        run(tmp_path)
    assert seen == []
    run(tmp_path, "reward", "ppo")
    assert seen == ["sft, resumed" if checkpoint else "sft", "reward", "responses", "ppo"]


def test_a_pipeline_that_is_refused_leaves_nothing(seen: list[str], product: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="redo: there is no stage 'nothing'"):
        run(tmp_path, "nothing")
    assert not (tmp_path / "run").exists()
