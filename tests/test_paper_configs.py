"""The paper's configs: its numbers, its batch arithmetic on 8 GPUs, and each of them at work on a small GPT-NeoX."""

from __future__ import annotations

import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPTNeoXConfig

import rlhf.studies.scaling
from rlhf.cli.main import main
from rlhf.data.loaders import accumulation
from rlhf.data.token_budget import ROOM
from rlhf.models import memory
from rlhf.models.adapters import LoRA
from rlhf.models.memory import Workload, estimate, networks
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.report.curve_files import read_curves
from rlhf.report.report import report
from rlhf.report.runs import Baseline, Run
from rlhf.studies.processes import Ended, stage_processes
from rlhf.synthetic.posts import comparisons, demonstrations
from rlhf.synthetic.synthesize import SmallModel, create_model

FOLDER = Path(__file__).parent.parent / "configs" / "tldr"
SIZES = ["1b", "2.8b", "6.9b"]
EXPORT = "rlhf.callbacks.export.Export"
SHAPES = {"1b": (2048, 16, 8, 50304), "2.8b": (2560, 32, 32, 50304), "6.9b": (4096, 32, 32, 50432)}
STAGES = ["sft", "reward", "ppo"]  # of the pipeline
PAIRS = list(product([*STAGES, "dpo"], SIZES))
EXAMPLES = {"sft": (116_722, 128), "reward": (92_858, 64), "dpo": (92_858, 64), "ppo": (1_000_000, 512)}


def words(stage: str, size: str) -> list[str]:
    return [f"--config={FOLDER}/{name}.yaml" for name in ("common", stage, f"{stage}_{size}")]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], dict[str, Any]]:
    """The whole config of a stage, as the command line understands it."""

    def printed(stage: str, size: str) -> dict[str, Any]:
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *words(stage, size), "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return printed


@pytest.mark.parametrize(("stage", "size"), PAIRS)
def test_the_numbers_are_the_papers(stage: str, size: str, printed: Callable[..., dict[str, Any]]) -> None:
    config = printed(stage, size)
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert config["seed_everything"] == 44413
    assert (trainer["devices"], trainer["strategy"], trainer["precision"]) == (8, "zero2", "bf16-mixed")
    examples, batch = EXAMPLES[stage]
    assert data["batch_size"] == batch
    optimization = model["optimization"]
    assert (optimization["learning_rate"], optimization["eps"]) == (3e-6, 1e-5)
    assert optimization["schedule"] == ("linear" if stage == "ppo" else "cosine")
    assert optimization["warmup_steps"] == 0
    assert trainer["max_epochs"] == (examples // batch if stage == "ppo" else 1)
    accumulate = accumulation(batch, data["micro_batch_size"], 8)
    assert accumulate * data["micro_batch_size"] * 8 == batch
    if stage == "ppo":
        expected = {"1b": (16, 4, 64), "2.8b": (4, 16, 32), "6.9b": (1, 64, 4)}[size]
        assert (data["micro_batch_size"], accumulate, data["rollout_batch_size"]) == expected
        place = "cpu" if size == "6.9b" else "device"
        assert (model["reference_placement"], model["reward_placement"]) == (place, place)
        assert (model["ppo"]["ppo_epochs"], model["ppo"]["minibatches"]) == (4, 1)
    if stage == "sft":
        assert model["model_path"] == f"EleutherAI/pythia-{size}-deduped"


def test_what_the_sizes_share_stands_once() -> None:
    for stage, size in PAIRS:
        own = yaml.safe_load((FOLDER / f"{stage}_{size}.yaml").read_text())
        shared = yaml.safe_load((FOLDER / f"{stage}.yaml").read_text())
        for room in ("model", "data"):
            assert not set(own[room]["init_args"]) & set(shared[room]["init_args"])
        assert "trainer" not in own


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of a pipeline's stages, which are not run."""

    def run(words: list[str], log: Path | None) -> Ended:
        if "--runs" not in words:  # that of what there is after a stage
            commands.append(words)
        return Ended(0, 0.0, 0.0)

    commands: list[list[str]] = []
    monkeypatch.setattr(stage_processes, "run", run)
    monkeypatch.setattr(stage_processes, "warm_up", lambda: None)
    monkeypatch.setattr("rlhf.studies.pipeline.complaints", lambda jobs, stand_ins: [])
    monkeypatch.chdir(FOLDER.parent.parent)
    return commands


@pytest.mark.parametrize("size", SIZES)
def test_a_pipeline_runs_its_three_stages_with_a_seed_and_evaluates(
    size: str, tmp_path: Path, commands: list[list[str]]
) -> None:
    main(["pipeline", f"--config={FOLDER}/pipeline.yaml", f"--size={size}", "--seed=55513", f"--run_dir={tmp_path}"])
    assert [words[0] for words in commands] == ["fit"] * 3 + ["generate"] * 2 + ["judge"] * 2 + ["margins", "report"]
    for stage, line in zip(STAGES, commands, strict=False):
        assert line[2:8:2] == [f"configs/tldr/{name}.yaml" for name in ("common", stage, f"{stage}_{size}")]
        assert f"--run_dir={tmp_path}/{stage}" in line
        assert "--seed_everything=55513" in line
    assert f'"size": "{size}", "seed": 55513' in commands[-1][-1]


MACHINES = [  # files after pipeline.yaml, size, GiB of a GPU
    (["tldr/one_h100"], "1b", 79.0), *((["tldr/eight_h100"], size, 79.0) for size in SIZES),
    (["lora/one_80gb"], "6.9b", 79.0), (["lora/one_80gb", "lora/one_24gb"], "6.9b", 23.0),
]  # fmt: skip
ADAPTERS = ("lora", "quantization", "reference_placement", "reward_placement")
FITTING = {"data.init_args.max_tokens_per_micro_batch", "data.init_args.rollout_batch_size"}


def dotted(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield from dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def needed(stage: str, size: str, config: dict[str, Any], rows: int) -> dict[str, float]:
    """GiB of each phase with that many rows per micro-batch."""
    hidden, layers, heads, vocabulary = SHAPES[size]
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    frozen = {name: model.get(f"{name}_placement", "device") for name in ("reference", "reward")}
    inference = max(data["eval_batch_size"], data.get("rollout_batch_size", 0))
    strategy: Any = {"auto": "single", "zero2": "zero2"}[trainer["strategy"]]
    lengths = 512, 126 if stage == "reward" else 53
    adapters = {"lora": LoRA(**model["lora"]) if model["lora"] else None, "quantization": model["quantization"]}
    shapes = int(trainer["devices"]), rows, inference, *lengths
    run = Workload(stage, strategy, "bf16-mixed", *shapes, **frozen, **adapters)  # type: ignore[arg-type]
    pythia = GPTNeoXConfig(hidden_size=hidden, intermediate_size=4 * hidden, **shape)
    return {name: phase.total / 2**30 for name, phase in estimate(pythia, run).items()}


@pytest.fixture(scope="module")
def measured_once() -> Iterator[None]:
    """Models are built once for all their estimates."""
    known: dict[tuple[str, ...], Any] = {}

    def once(config: Any, stage: str, lora: LoRA | None) -> Any:
        key = config.to_json_string(), stage, repr(lora)
        return known[key] if key in known else known.setdefault(key, networks(config, stage, lora))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "networks", once)
        yield


@pytest.fixture(scope="module")
def papers() -> dict[str, list[dict[str, Any]]]:
    """Size -> the paper's config of each stage, once it is known."""
    return {}


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(("machine", "size", "gib"), MACHINES)
def test_other_machines_change_no_result_and_have_room(
    machine: list[str], size: str, gib: float, tmp_path: Path, commands: list[list[str]],
    papers: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Micro-batches as `auto` makes them, at least as large as the paper's, leave a tenth of the memory free."""

    def config_of(line: list[str]) -> dict[str, Any]:
        with pytest.raises(SystemExit, match="0"):
            main([*line, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out.replace(str(tmp_path), "run"))

    def configs_of(*machine: str) -> list[dict[str, Any]]:
        words = ["pipeline", f"--config={FOLDER}/pipeline.yaml", f"--size={size}", f"--run_dir={tmp_path}"]
        commands.clear()
        main([*words, *(f"--config={FOLDER.parent}/{name}.yaml" for name in machine)])
        capsys.readouterr()
        return [config_of(line) for line in commands[: len(STAGES)]]

    if size not in papers:
        papers[size] = [dict(dotted(config)) for config in configs_of()]
    changing = FITTING | ({"trainer.devices", "trainer.strategy"} if "one" in machine[0] else set())
    if "lora" in machine[0]:
        changing |= {f"model.init_args.{name}" for name in (*ADAPTERS, "optimization.learning_rate")}
        changing.add("data.init_args.eval_batch_size")
    for stage, paper, config in zip(STAGES, papers[size], configs_of(*machine), strict=True):
        changed = {key for key, value in dotted(config) if value != paper.get(key)}
        assert {key for key in changed if ".lora." not in key} <= changing
        assert any(".lora." in key for key in changed) == ("lora" in machine[0])
        data = config["data"]["init_args"]
        assert data["max_tokens_per_micro_batch"] == "auto"
        fits = partial(needed, stage, size, config)
        share = data["batch_size"] // int(config["trainer"]["devices"])
        rows = bisect_right(range(1, share + 1), ROOM * gib, key=lambda rows, fits=fits: fits(rows)["training"])
        assert rows >= data["micro_batch_size"]
        assert max(fits(rows).values()) < 0.9 * gib


def test_the_study_is_the_pipelines_over_sizes_and_seeds() -> None:
    study = yaml.safe_load((FOLDER / "scaling.yaml").read_text())
    assert (study["sizes"], study["seeds"]) == (SIZES, [44413, 55513, 66613, 77713])
    assert study["baselines"] == [{"name": "OpenAI 1.3B PPO", "parameters": 1_300_000_000, "win_rate": 0.7}]
    assert study["stages"][-1]["config"].pop() == "ppo_exports.yaml"
    pipeline = yaml.safe_load((FOLDER / "pipeline.yaml").read_text())
    assert [stage["config"] for stage in study["stages"]] == [pipeline[stage]["config"] for stage in STAGES]
    generate, judge, margins = (study["evaluation"][command] for command in ("generate", "judge", "margins"))
    assert generate["data.path"] == pipeline["demonstrations"]["path"]
    assert {key: margins[f"data.{key}"] for key in pipeline["comparisons"]} == pipeline["comparisons"]
    assert judge == {"judge": pipeline["judge"]["class_path"], "judge.model": pipeline["judge"]["init_args"]["model"]}
    assert [row["batch_size"] for row in (generate, margins)] == [
        pipeline[k]["batch_size"] for k in ("generate", "margins")
    ]
    exports = yaml.safe_load((FOLDER / "ppo_exports.yaml").read_text())["trainer"]["callbacks+"]
    assert (
        yaml.safe_load((FOLDER / "ppo.yaml").read_text())["trainer"]["max_epochs"]
        % exports[0]["init_args"]["every_n_epochs"]
        == 0
    )  # the last export is that of the end


def test_the_study_runs_on_small_models_and_data(
    tmp_path: Path,
    tokenizer: Any,
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With other models, data, judge, machine and numbers of examples; all else as shipped."""

    def run(words: list[str], log: Path) -> Ended:
        main(words)
        return Ended(0, 0.0, 0.0)

    def spied(output: str, runs: list[Run], baselines: list[Baseline], *settings: Any) -> Any:
        seen.extend(baselines)
        return report(output, runs, baselines, *settings)

    seen: list[Baseline] = []
    monkeypatch.setattr(stage_processes, "run", run)
    monkeypatch.setattr(rlhf.studies.scaling, "report", spied)
    configs = tmp_path / "tldr"
    shutil.copytree(FOLDER, configs)
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(16, 1, "train"))
    pairs = write_jsonl("comparisons.jsonl", comparisons(16, 1, "train"))
    small = {"batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 8}
    sources = {
        name: {"path": path, "name": None, "revision": None, "split": "train"}
        for name, path in (("demonstrations", prompts), ("comparisons", pairs))
    }

    def change(name: str, changes: dict[str, Any]) -> None:
        file = configs / f"{name}.yaml"
        config = yaml.safe_load(file.read_text())
        for key, value in changes.items():
            *rooms, last = key.split(".")
            target = config
            for room in rooms:
                target = target.setdefault(room, {})
            target[last] = value
        file.write_text(yaml.safe_dump(config))

    machine = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    change("common", {f"trainer.{key}": value for key, value in machine.items()})
    for size, width in (("1b", 16), ("2.8b", 32)):
        create_model(tmp_path / size, tokenizer, SmallModel(hidden_size=width, layers=1, heads=2), seed=1)
        change(f"sft_{size}", {"model.init_args.model_path": str(tmp_path / size)})
        for stage in STAGES:
            change(f"{stage}_{size}", {f"data.init_args.{key}": value for key, value in small.items()})
    for stage, kind in (("sft", "demonstrations"), ("reward", "comparisons"), ("ppo", "demonstrations")):
        change(stage, {f"data.init_args.{split}": sources[kind] for split in ("train", "validation")})
    change("reward", {"data.init_args.demonstrations": sources["demonstrations"]})
    change("ppo", {"trainer.max_epochs": 2, "model.init_args.ppo.response_length": 6})
    change("ppo_exports", {"trainer.callbacks+": [{"class_path": EXPORT, "init_args": {"every_n_epochs": 1}}]})
    study = yaml.safe_load((FOLDER / "scaling.yaml").read_text())
    generates = [study["evaluation"]["generate"], study["checkpoints"][0]["takes"]]
    for takes, kind in (
        (generates[0], "demonstrations"),
        (generates[1], "demonstrations"),
        (study["evaluation"]["margins"], "comparisons"),
    ):
        takes |= {f"data.{key}": value for key, value in sources[kind].items()}
    for takes in generates:
        takes["response_length"] = 6
    for takes in study["evaluation"]["judge"], study["checkpoints"][1]["takes"]:
        del takes["judge.model"]
        takes["judge"] = "GoldJudge"
    (configs / "scaling.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    words = [f"--config={configs}/scaling.yaml", f"--config_dir={configs}", f"--run_dir={out}"]
    main(["scaling", *words, "--sizes=[1b, 2.8b]", "--seeds=[44413]"])
    assert (out / "report.md").is_file()
    assert {(star.name, star.win_rate) for star in seen} == {("OpenAI 1.3B PPO", 0.7)}
    assert (out / "2.8b" / "seed-44413" / "judge_2.parquet").is_file()


@pytest.mark.parametrize("script", sorted((FOLDER.parent / "cluster").glob("*.sh")), ids=lambda file: file.name)
def test_the_scripts_for_clusters_start_a_run_that_parses(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER.parent.parent)
    show = 'function srun { shift 2; echo "$@"; }; function torchrun { shift 11; echo "$@"; };'
    shell = f"set -e; NODES=2; NODE=0; HEAD=localhost; SLURM_NNODES=2; {show} source {script}"
    line = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.split()
    with pytest.raises(SystemExit, match="0"):
        main([*line, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["trainer"]["num_nodes"], config["trainer"]["devices"]) == (2, 8)
    assert config["model"]["init_args"]["reward_placement"] == "cpu"


@pytest.mark.parametrize(("stage", "size"), PAIRS)
def test_two_steps_on_a_small_model(
    stage: str, size: str, tmp_path: Path, model_path: str, write_jsonl: Callable[..., str]
) -> None:
    prompts = write_jsonl("demonstrations.jsonl", demonstrations(24, 1, "train"))
    pairs = write_jsonl("comparisons.jsonl", comparisons(16, 1, "train"))
    source = {"limit": "16", "name": "null", "revision": "null", "split": "train"}
    given = [f"--model.model_path={model_path}", f"--run_dir={tmp_path}/run", "--data.batch_size=8"]
    given += ["--data.micro_batch_size=2", "--data.eval_batch_size=8"]
    for split in ("train", "validation", *(["demonstrations"] if stage == "reward" else [])):
        path = pairs if stage in ("reward", "dpo") and split != "demonstrations" else prompts
        given += [f"--data.{split}.{key}={value}" for key, value in {"path": path, **source}.items()]
    given += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    if stage == "ppo":
        ScalarModel.from_policy(model_path, 1).save(tmp_path / "reward", load_tokenizer(model_path))
        given += [f"--model.reward_path={tmp_path}/reward", "--trainer.max_epochs=2"]
        given += ["--model.ppo.response_length=6", "--data.rollout_batch_size=4"]
    elif stage == "sft":
        given += ["--model.response_length=4"]
    main(["fit", *words(stage, size), *given])
    assert (tmp_path / "run" / "export" / "rlhf.json").is_file()
    if stage == "ppo":
        curves = read_curves(tmp_path / "run")
        assert curves["episode"].tolist() == [8, 16]
        assert curves["val/ratio_max_deviation"].max() < 0.25  # bfloat16
