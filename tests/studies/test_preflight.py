"""Preflight: what is wrong with any stage is told before the first one starts, all of it at once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from rlhf.cli.rehearsal import sentences
from rlhf.models.loading import load_config
from rlhf.models.memory import trained_parameters
from rlhf.studies.preflight import complaints
from rlhf.studies.processes import Ended, stage_processes


class Plan(NamedTuple):
    """The command lines of a pipeline, by stage, and the model that it starts from."""

    jobs: dict[str, list[str]]
    run: Path
    model: str

    def complaints(self, *stages: str, find: Callable[..., list[str]] = sentences, **more: list[str]) -> list[str]:
        """What is said of some stages, by default of all, with more words on the command lines of some."""
        exports = {str(self.run / name / "export"): self.model for name in ("sft", "reward", "ppo")}
        tables = dict.fromkeys((str(self.run / f"{name}.parquet") for name in ("generate", "judge", "margins")), "")
        jobs = [
            (name, words + more.get(name, [])) for name, words in self.jobs.items() if name in (stages or self.jobs)
        ]
        return find(jobs, exports | tables)


@pytest.fixture
def plan(model_path: str, demonstration_file: str, comparison_file: str, tmp_path: Path) -> Plan:
    """A pipeline in which nothing is wrong."""
    run, demonstrations, comparisons = tmp_path / "run", {"path": demonstration_file}, {"path": comparison_file}

    def fit(name: str, models: dict[str, str], data: dict[str, Any], kind: str, module: str) -> list[str]:
        settings = {
            "run_dir": str(run / name),
            "model": {"class_path": module, "init_args": models},
            "data": {"class_path": kind, "init_args": {"batch_size": 8, "micro_batch_size": 4, **data}},
            "trainer": {"accelerator": "cpu", "devices": 1},
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(settings))
        return ["fit", f"--config={file}"]

    sft, reward = str(run / "sft" / "export"), str(run / "reward" / "export")
    both = {"train": demonstrations, "validation": demonstrations}
    pairs = {"train": comparisons, "validation": comparisons, "demonstrations": demonstrations}
    table, judged, margins = (str(run / f"{name}.parquet") for name in ("generate", "judge", "margins"))
    runs = [{"size": "a", "parameters": None, "seed": 1, "policies": {"PPO": judged}, "margins": margins}]
    jobs = {
        "sft": fit("sft", {"model_path": model_path}, both, "SFTDataModule", "SFTModule"),
        "reward": fit("reward", {"model_path": sft}, pairs, "PreferenceDataModule", "RewardModule"),
        "ppo": fit("ppo", {"model_path": sft, "reward_path": reward}, both, "RolloutDataModule", "PPOModule"),
        "generate": [
            "generate", f"--output={table}", f"--model={run / 'ppo' / 'export'}", f"--data.path={demonstration_file}",
            f"--reward={reward}",
        ],
        "judge": [
            "judge", f"--output={judged}", f"--a.table={table}", f"--b.table={table}", "--b.column=reference",
            "--judge=RewardJudge", f"--judge.model={reward}",
        ],
        "margins": ["margins", f"--output={margins}", f"--reward={reward}", f"--data.path={comparison_file}"],
        "report": ["report", f"--output={run}", f"--runs={json.dumps(runs)}"],
    }  # fmt: skip
    return Plan(jobs, run, model_path)


def test_nothing_is_said_of_a_good_pipeline_and_nothing_is_written(plan: Plan) -> None:
    assert plan.complaints() == []
    assert not plan.run.exists()


def test_several_processes_are_counted_and_none_is_started(plan: Plan) -> None:
    two = ["--trainer.devices=2", "--data.micro_batch_size=2"]
    assert plan.complaints("sft", "reward", "ppo", sft=two, reward=two, ppo=two) == []
    many = ["--trainer.devices=64", "--data.micro_batch_size=1", "--data.batch_size=64"]
    [found] = plan.complaints("sft", sft=many)
    assert found == "sft: 32 rows cannot be shared by 64 processes; use fewer, or more rows."


@pytest.mark.parametrize(
    ("stage", "words", "sentence"),
    [
        ("sft", ["--data.batchsize=8"], "batchsize"),
        ("sft", ["--data.batch_size=many"], "data.batch_size is many: it should be a valid integer."),
        ("sft", ["--model=NoModule"], "there is no class NoModule"),
        ("sft", ["--model.optimization.learning_rate=-1"], "model.optimization.learning_rate is -1"),
        ("sft", ["--data.batch_size=7"], "data.batch_size 7 does not divide into 1 processes x"),
        ("sft", ["--data.train.path=nowhere.jsonl"], "data.train: there is no file nowhere.jsonl."),
        ("sft", ["--data.test={path: nowhere.jsonl}"], "data.test: there is no file nowhere.jsonl."),
        ("sft", ["--data.text.chat_template=nowhere.jinja"], "data.text.chat_template: the file nowhere.jinja"),
        ("sft", ["--data.text.completion={nothing}"], r"data.text.completion: data\."),
        ("sft", ["--model.eos_tokens=[a b c d e f]"], "model.eos_tokens: 'a b c d e f' is"),
        ("sft", ["--trainer.precision=bf16-true"], "trainer.precision bf16-true rounds"),
        ("sft", ["--trainer.strategy=zero9"], "trainer: "),
        ("sft", ["--trainer.accelerator=cuda", "--trainer.devices=99"], "(?i)gpu|cuda"),
        ("sft", ["--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no checkpoint nowhere.ckpt."),
        ("sft", ["--model.response_length=500"], "more than the 512 positions of the model"),
        ("sft", ["--data.max_tokens_per_micro_batch=9"], "data.max_tokens_per_micro_batch is 9, less than the"),
        ("ppo", ["--data.batch_size=64"], "data.batch_size 64 is larger than the 32 prompts of data.train"),
        ("ppo", ["--model.ppo.minibatches=4"], "8 does not divide into 1 processes x .* 4 x 4 minibatches"),
        ("ppo", ["--model.ppo.kl_target=1", "--model.ppo.kl_horizon=1"], "model.ppo.kl_horizon is 1"),
        ("ppo", ["--model.reward_function=no.such"], "reward_function"),
        ("ppo", ["--model.reference_placement=zero3"], "zero3 need trainer.strategy zero2"),
        ("generate", ["--model=MODEL", "--response_length=500"], "response_length: the longest query"),
        ("generate", ["--vllm_cache_gib=2"], "vllm_cache_gib is for sampler vllm"),
        ("generate", ["--sampler=vllm", "--temperature=0.001"], "sampler vllm needs vLLM|temperature is 0.001"),
        ("generate", ["--best_of=4", "--reward=null"], "best_of is 4: give the reward model"),
        ("generate", ["--model=MODEL", "--reference=./nowhere"], "reference: there is no model folder ./nowhere"),
        ("generate", ["--output=table.txt"], "output: table.txt must end in .parquet or .csv."),
        ("judge", ["--judge=Nobody"], "judge"),
        ("judge", ["--judge.model=./nowhere"], "judge.model: there is no model folder ./nowhere"),
        ("judge", ["--judge.model=MODEL"], "judge.model: .* not a reward model with one label"),
        ("judge", ["--a.table=nowhere.parquet", "--b.table=nowhere.parquet"], "a.table: there is no table nowhere"),
        ("margins", ["--data.path=nowhere.jsonl"], "data: there is no file nowhere.jsonl."),
        ("report", ["--runs=[]"], "runs: give at least one run."),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else None,
)
def test_each_mistake_is_named(plan: Plan, stage: str, words: list[str], sentence: str) -> None:
    stages = ["sft", *(["reward"] if stage in ("ppo", "judge") else []), stage]
    found = plan.complaints(*stages, **{stage: [word.replace("MODEL", plan.model) for word in words]})
    assert found
    assert all(one.startswith(f"{stage}: ") for one in found)
    assert all(re.search(sentence, one) for one in found)


def test_mistakes_of_all_stages_come_together_and_a_sentence_only_once(plan: Plan, write_jsonl: Any) -> None:
    pairs = write_jsonl("pairs.jsonl", [{"prompt": "a", "chosen": "b", "worse": "c"}] * 3)
    empty = write_jsonl("empty.jsonl", [])
    found = plan.complaints(
        sft=["--model.model_path=./nowhere", f"--data.validation.path={empty}", "--data.batch_size=7"],
        reward=[f"--data.train.path={pairs}", "--data.batch_size=5", "--trainer.precision=16-true"],
        ppo=[f"--data.validation.path={empty}", "--data.typo=1"],
        margins=[f"--data.path={pairs}"],
    )
    starts = ["sft: model.model_path: there is no model folder ./nowhere", "sft: data.validation: "]
    starts += [
        "reward: trainer.precision 16-true",
        f"reward: data.train: {pairs} has the columns prompt, chosen, worse",
    ]
    starts += ["ppo: ", f"margins: data: {pairs} has the columns prompt, chosen, worse"]
    assert all(one.startswith(start) for one, start in zip(found, starts, strict=True)), found
    found = plan.complaints(sft=["--data.train.path=no.csv"], ppo=["--data.train.path=no.csv", "--data.batch_size=7"])
    assert found[0] == "sft, ppo: data.train: there is no file no.csv."
    assert [one.split(" ")[0] for one in found] == ["sft,", "ppo:"]


def test_later_stages_see_what_earlier_ones_will_export(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "pads_with_eos"
    shutil.copytree(plan.model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    own = [f"--model.model_path={folder}"]
    other = Plan(plan.jobs, plan.run, str(folder))
    [found] = other.complaints(sft=own)  # and nothing of stages that would get PAD from it
    assert found.startswith("sft: model.model_path: the tokenizer of")
    assert "pads with its EOS token" in found
    assert other.complaints(sft=[*own, "--model.pad_token=<new>", "--model.resize_embeddings=true"]) == []
    # with the base model's tokenizer the records of all stages are still read
    long = ["--data.text.max_query_length=3"]
    found = other.complaints("sft", "reward", sft=[*own, *long], reward=long)
    assert len(found) == 6
    assert all("data.text.max_query_length" in one for one in found[1:])


def test_a_reward_model_of_someone_else(plan: Plan, reward_path: str) -> None:
    assert plan.complaints("sft", "ppo", ppo=[f"--model.reward_path={reward_path}"]) == []
    [found] = plan.complaints("sft", "ppo", ppo=[f"--model.reward_path={plan.model}"])
    assert found.startswith(f"ppo: model.reward_path: {plan.model} holds GPTNeoXForCausalLM, not a reward model")
    config = Path(reward_path) / "config.json"
    labels = json.loads(config.read_text()) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    config.write_text(json.dumps(labels))
    [found] = plan.complaints("sft", "ppo", ppo=[f"--model.reward_path={reward_path}"])
    assert "not a reward model with one label" in found


def test_room_on_the_disk(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(plan.model, "model")
    sft, ppo = (4 * trained_parameters(config, kind) for kind in ("sft", "ppo"))
    alone = ["--model.reward_path=null", "--model.reward_function=rlhf.synthetic.gold_score.gold_scores"]
    exports = ["--trainer.max_epochs=6", "--trainer.callbacks+=Export", "--trainer.callbacks.every_n_epochs=2"]
    # SFT keeps weights, two moments, and an export; PPO writes a checkpoint beside the last one, after three exports
    needed = (3 * sft + sft) + 2 * 3 * ppo + 3 * ppo
    room = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    assert plan.complaints("sft", "ppo", ppo=[*exports, *alone]) == []
    room.free -= 1
    [found] = plan.complaints("sft", "ppo", ppo=[*exports, *alone])
    assert found.startswith("ppo: run_dir: checkpoints and exports will take up to 0.0 GiB, but the disk of")


def test_a_folder_that_cannot_be_written(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = plan.complaints(
        "sft", "margins", sft=[f"--run_dir={tmp_path}/file/run"], margins=[f"--output={tmp_path}/file/m.csv"]
    )
    assert found[0].endswith(f"file/run cannot be created: {tmp_path}/file is a file.")
    assert found[1].startswith("margins: output: the folder")


def test_it_happens_in_a_process_of_its_own(plan: Plan) -> None:
    find: Any = complaints
    assert plan.complaints("sft", find=find) == []
    [found] = plan.complaints("sft", find=find, sft=["--data.train.path=no.csv"])
    assert found == "sft: data.train: there is no file no.csv."


def test_a_process_that_ends_without_a_result_is_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], log: Path) -> Ended:
        log.write_text("first\nout of memory\n")
        return Ended(-9, 0.0, 0.0)

    monkeypatch.setattr(stage_processes, "run", run)
    [found] = complaints([("sft", plan.jobs["sft"])], {})
    assert found == "the stages could not be looked at: the process ended with status -9, out of memory"


def test_the_first_rows_of_a_part_are_not_looked_for_at_the_head_of_the_file(plan: Plan) -> None:
    """Of 32 records none of the first 2 needs to be in the part."""
    more = ["--data.validation.part=[0, 0.2]", "--data.validation.limit=2"]
    assert plan.complaints("sft", sft=more) == []
    few = plan.complaints("sft", sft=["--data.validation.part=[0, 0.0001]"])
    assert len(few) == 1
    assert "falls into the part" in few[0]
