from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM

import rlhf.studies.scaling
from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.report.runs import Run
from rlhf.studies.processes import Ended, stage_processes
from rlhf.studies.recipe import evaluation_stages
from rlhf.studies.scaling import count_parameters
from rlhf.synthetic.synthesize import SmallModel, create_model

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "configs" / "scaling" / "study.yaml"
SMALL = {
    "pretraining": 64, "train": 160, "validation": 24, "comparisons": 64, "comparisons_validation": 24,
    "comparisons_news": 6,
}  # fmt: skip
SHAPES = {
    "tiny": {"hidden_size": 16, "layers": 1, "heads": 2},
    "small": {"hidden_size": 32, "layers": 1, "heads": 2},
}
QUICK = [
    "--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
    "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    """Words for the shipped study with two sizes of a tiny model, few data, and two updates of PPO."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "quickstart", configs / "quickstart")
    shutil.copytree(ROOT / "configs" / "scaling", configs / "scaling")
    data = configs / "scaling" / "data.yaml"
    small = {"sizes": SMALL, "model": {"vocabulary": 500, **SHAPES["small"]}}
    data.write_text(yaml.safe_dump(yaml.safe_load(data.read_text()) | small))
    for name, shape in SHAPES.items():
        (configs / "scaling" / f"model_{name}.yaml").write_text(yaml.safe_dump({"model": shape}))
    ppo = configs / "scaling" / "ppo.yaml"
    ppo.write_text(ppo.read_text().replace("every_n_epochs: 8", "every_n_epochs: 1"))
    return [
        "scaling", f"--config={STUDY}", f"--run_dir={tmp_path}/out", f"--config_dir={configs}/quickstart",
        f"--sizes=[{', '.join(SHAPES)}]", f"--arguments={json.dumps(QUICK)}", "--processes=1",
    ]  # fmt: skip


def product(words: list[str]) -> Path:
    """The file that a stage writes last."""
    output = Path(next(word for word in words if word.startswith(("--run_dir=", "--output="))).partition("=")[2])
    return {"fit": output / "export" / "rlhf.json", "synthesize": output / "synthesize.json"}.get(words[0], output)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, model_path: str) -> tuple[list[list[str]], list[Run]]:
    """Stages write their last file and nothing else, and PPO two exports; their commands, and the runs of a report."""
    seen: list[list[str]] = []
    runs: list[Run] = []

    def run(words: list[str], log: Path) -> Ended:
        seen.append(words)
        file = product(words)
        file.parent.mkdir(parents=True, exist_ok=True)
        if words[0] == "fit":
            shutil.copytree(model_path, file.parent, dirs_exist_ok=True)
            for update in (8, 16) if file.parts[-3] == "ppo" else ():
                export = file.parent.with_name(f"export-{update}")
                export.mkdir()
                (export / "rlhf.json").write_text("{}")
        file.write_text("{}")
        return Ended(0, 0.0, 0.0)

    def report(output: str, found: list[Run], *settings: Any) -> None:
        runs[:] = found
        (Path(output) / "report.md").write_text("# Report\n")

    monkeypatch.setattr(stage_processes, "run", run)
    monkeypatch.setattr(rlhf.studies.scaling, "report", report)
    return seen, runs


def place(words: list[str], root: Path) -> str:
    file = product(words).relative_to(root)
    folder = {"fit": file.parent.parent, "synthesize": file.parent}
    return str(folder.get(words[0], file.with_suffix("")))


def test_two_seeds_from_nothing_to_a_report(
    study: list[str],
    commands: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """tests/test_paper_configs.py has two sizes."""
    study.append("--sizes=[tiny]")
    main(study)
    out = tmp_path / "out"
    said = capsys.readouterr().out
    assert [number for number in (1, 2) if f"of {number} of 2 runs" in said] == [1, 2]  # and those so far
    assert "# Report" in (out / "report.md").read_text()
    assert sum(words[0] == "fit" for words in commands) == 1 + 2 * 3
    tokenizers = {(out / path / "tokenizer.json").read_bytes() for path in (
        "tiny/base/model/model", "tiny/seed-2/ppo/export")}  # fmt: skip
    assert len(tokenizers) == 1
    tables = [pd.read_parquet(out / "tiny" / f"seed-{seed}" / "judge_ppo.parquet") for seed in (1, 2)]
    assert tables[0]["query"].tolist() == tables[1]["query"].tolist()
    assert len(tables[0]) == SMALL["validation"]
    assert (tables[0]["a"] != tables[1]["a"]).any(), "seeds differ"
    assert tables[0]["judge"].unique().tolist() == [tables[1]["judge"].iloc[0]]
    last = pd.read_parquet(out / "tiny" / "seed-1" / "judge_2.parquet")
    assert last["a"].tolist() == tables[0]["a"].tolist()  # the export after the last update is that of the end
    again: list[tuple[str, int]] = []

    def report(output: str, runs: list[Run], *settings: Any) -> None:
        again.extend((run.size, run.seed) for run in runs)

    monkeypatch.setattr(rlhf.studies.scaling, "report", report)
    commands.clear()
    main(study)
    assert commands == []
    assert again == [("tiny", 1), ("tiny", 2)]


def test_the_order_the_seeds_and_the_folders(
    pretended: tuple[list[list[str]], list[Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    seen, runs = pretended
    main(["scaling", f"--config={STUDY}", f"--run_dir={tmp_path}/out", "--processes=2"])
    config = yaml.safe_load(STUDY.read_text())
    evaluation = evaluation_stages(config["evaluation"])
    names = [place(words, tmp_path / "out") for words in seen]
    assert names[0] == "shared/data"
    assert len(names) == len(set(names)) == 1 + 3 * 2 + 3 * 2 * (len(config["stages"]) + len(evaluation) + 2 * 2)
    for size in config["sizes"]:
        model = names.index(f"{size}/base/model")
        assert f"--tokenizer={tmp_path}/out/shared/data/model" in seen[model]
        assert model < names.index(f"{size}/base/pretrain")
        for seed in config["seeds"]:
            own = [name.rpartition("/")[2] for name in names if name.startswith(f"{size}/seed-{seed}/")]
            judged = ["generate_8", "judge_8", "generate_16", "judge_16"]
            assert own == [
                *(stage["name"] for stage in config["stages"]),
                *(stage.name for stage in evaluation),
                *judged,
            ]
            assert names.index(f"{size}/base/pretrain") < names.index(f"{size}/seed-{seed}/sft")
    for name, words in zip(names, seen, strict=True):
        seeds = [word for word in words if word.startswith("--seed")]
        assert seeds == (
            [f"--seed_everything={name.split('seed-')[1][0]}"] if "/seed-" in name and words[0] == "fit" else []
        )
    sft = seen[names.index("w128/seed-2/sft")]
    assert f"--model.model_path={tmp_path}/out/w128/base/pretrain/export" in sft
    assert f"--data.train.path={tmp_path}/out/shared/data/demonstrations" in sft
    assert [(run.size, run.seed) for run in runs] == [(s, n) for s in config["sizes"] for n in config["seeds"]]
    folder = f"{tmp_path}/out/{config['sizes'][0]}/seed-1"
    assert runs[0].policies == {label: f"{folder}/judge_{label.lower()}.parquet" for label in ("SFT", "PPO")}
    assert runs[0].margins == f"{folder}/margins.parquet"
    assert runs[0].checkpoints == {update: f"{folder}/judge_{update}.parquet" for update in (8, 16)}
    assert runs[0].stages == {stage: f"{folder}/{stage}" for stage in ("sft", "reward", "ppo")}
    assert runs[0].parameters


def test_a_failed_stage_stops_its_own_run_only_and_the_rest_is_reported(
    study: list[str],
    pretended: tuple[list[list[str]], list[Run]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen, runs = pretended
    inner = stage_processes.run

    def broken(*names: str) -> Callable[..., Ended]:
        def run(words: list[str], log: Path) -> Ended:
            if place(words, tmp_path / "out") in names:
                raise UserError(f"{place(words, tmp_path)} broke")
            return inner(words, log)

        return run

    def stopped() -> str:
        with pytest.raises(SystemExit):
            main(study)
        return capsys.readouterr().err

    monkeypatch.setattr(stage_processes, "run", broken("tiny/base/pretrain", "small/seed-2/reward"))
    error = stopped()
    assert "4 of 7 jobs failed; the same command resumes them:" in error
    assert "pretrain broke" in error
    assert "tiny/seed-2: not run, because tiny/base failed" in error
    assert [(run.size, run.seed) for run in runs] == [("small", 1)]
    names = [place(words, tmp_path / "out") for words in seen]
    assert not any(name.startswith("tiny/seed") for name in names)
    assert "small/seed-2/sft" in names
    assert "small/seed-2/ppo" not in names

    seen.clear()
    monkeypatch.setattr(stage_processes, "run", broken("small/seed-2/judge_16"))
    assert "judge_16 broke" in stopped()
    again = [place(words, tmp_path / "out") for words in seen]
    assert not set(again) & set(names)
    assert [(run.size, run.seed) for run in runs] == [(s, n) for s in SHAPES for n in (1, 2)]
    assert [sorted(run.checkpoints) for run in runs] == [[8, 16], [8, 16], [8, 16], [8]]

    seen.clear()
    monkeypatch.setattr(stage_processes, "run", inner)
    main(study)
    assert [place(words, tmp_path / "out") for words in seen] == ["small/seed-2/judge_16"]
    main([*study, "--seeds=[1, 2, 3]"])
    assert len(runs) == 6
    assert {place(words, tmp_path / "out").split("/")[1] for words in seen[1:]} == {"seed-3"}


def test_nothing_is_reported_where_nothing_is_finished(
    study: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(words: list[str], log: Path) -> Ended:
        raise UserError("no disk")

    monkeypatch.setattr(stage_processes, "run", run)
    with pytest.raises(SystemExit):
        main(study)
    assert "7 of 7 jobs failed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.md").exists()


def test_other_settings_are_refused_before_anything_is_overwritten(
    study: list[str], pretended: tuple[list[list[str]], list[Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, _ = pretended
    main(study)
    seen.clear()
    config = tmp_path / "configs" / "scaling" / "ppo.yaml"
    config.write_text(config.read_text() + "# changed\n")
    with pytest.raises(SystemExit):
        main(study)
    error = capsys.readouterr().err
    assert error.count("holds results of ppo with other settings") == 4
    assert seen == []


def test_a_study_without_exports_on_the_way_says_so(
    study: list[str], pretended: tuple[list[list[str]], list[Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, runs = pretended
    takes = json.dumps([{"name": "judge_{update}", "command": "judge", "takes": {"x": "{run}/sft/export-{update}"}}])
    with pytest.raises(SystemExit):
        main([*study, f"--checkpoints={takes}"])
    error = capsys.readouterr().err
    assert "sft has no export-<n>; give the callback rlhf.callbacks.export.Export an every_n_epochs" in error
    assert len(runs) == 4
    assert not any(run.checkpoints for run in runs)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--sizes=[unknown]"], "stages.model.config: there is no file"),
        (["--sizes=[tiny, small, tiny]"], "sizes: tiny is there more than once."),
        (["--sizes=[]"], "sizes is []: it should have at least 1 item"),
        (["--sizes=[../tiny]"], "sizes: '../tiny' cannot be the name of a folder"),
        (["--seeds=[]"], "seeds is []: it should have at least 1 item"),
        (["--seeds=[1, 1]"], "seeds: 1 is there more than once."),
        (["--shared=[{name: data}, {name: data}]"], "shared: data is there more than once."),
        (
            ['--checkpoints=[{name: sft, takes: {model: "{run}/ppo/export-{update}"}}]'],
            "stages: sft is there more",
        ),
        ([f"--seeds=[{2**32}]"], f"seeds.0 is {2**32}: it should be less than 4294967296"),
        (["--processes=0"], "processes is 0: it should be greater than 0."),
        (["--policies={}"], "policies is {}: it should have at least 1 item"),
        (["--policies={SFT: sft}"], "policies.SFT: no stage 'sft' judges"),
        (['--checkpoints=[{"name": "generate_{update}", "command": "generate"}]'], "checkpoints: one stage must take"),
    ],
)
def test_what_can_not_run_is_refused_before_anything_runs(
    study: list[str],
    pretended: tuple[list[list[str]], list[Run]],
    words: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main([*study, *words])
    assert error in capsys.readouterr().err
    assert pretended[0] == []


def test_one_seed_is_enough(study: list[str], pretended: tuple[list[list[str]], list[Run]]) -> None:
    main([*study, "--seeds=[7]"])
    assert [(run.size, run.seed) for run in pretended[1]] == [("tiny", 7), ("small", 7)]


def test_parameters_are_those_of_the_export(tmp_path: Path, tokenizer: Any) -> None:
    create_model(tmp_path, tokenizer, SmallModel(hidden_size=16, layers=1, heads=2), seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count_parameters(tmp_path) == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert count_parameters(tmp_path) == model.num_parameters()
