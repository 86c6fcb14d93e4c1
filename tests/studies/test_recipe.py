"""Which setting of a pipeline goes to which stage, and which stages there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.main import parsed
from rlhf.cli.parsing import split_words
from rlhf.errors import UserError
from rlhf.studies.pipeline import pipeline
from rlhf.studies.recipe import SECTIONS, Recipe, Shared
from rlhf.studies.runner import Runner

PAIRS = {"model": "base", "comparisons": "pairs.jsonl"}
BOTH = PAIRS | {"demonstrations": "sft.jsonl"}


def words(
    tmp_path: Path, shared: dict[str, Any], overrides: dict[str, Any] | None = None, **sections: Any
) -> dict[str, list[str]]:
    """The command line of every stage, with `RUN` for the run folder."""
    recipe = Recipe(Shared(**shared), sections, overrides, "small")
    with Runner(tmp_path / "run") as runner:
        return {
            stage.name: [word.replace(str(runner.run), "RUN") for word in runner.words(stage)]
            for stage in recipe.stages()
        }


@pytest.mark.parametrize(
    ("given", "stages"),
    [
        (BOTH, ["sft", "reward", "ppo"]),
        (PAIRS, ["sft", "reward", "ppo"]),  # SFT learns the chosen side
        (BOTH | {"reward_model": "theirs"}, ["sft", "ppo"]),
        ({"model": "base", "demonstrations": "sft.jsonl", "reward_function": "my.reward"}, ["sft", "ppo"]),
        ({"model": "base", "prompts": "prompts.jsonl", "reward_function": "my.reward"}, ["ppo"]),
    ],
)
def test_stages_are_those_that_there_is_something_to_learn_from(
    tmp_path: Path, given: dict[str, Any], stages: list[str]
) -> None:
    found = words(tmp_path, given)
    assert [name for name, line in found.items() if line[0] == "fit"] == stages
    compared = ["judge_sft", "judge_ppo"] if "prompts" not in given else ["judge_ppo"]
    evaluated = ["generate_sft", "generate_ppo", *compared]
    margins = ["margins"] if "comparisons" in given and given.get("reward_function") is None else []
    assert list(found)[len(stages) :] == [*evaluated, *margins, "report"]


def test_adapters_and_their_quantised_base_are_of_all_stages_that_train(tmp_path: Path) -> None:
    found = words(tmp_path, BOTH | {"lora": {"rank": 4}, "quantization": "nf4"})
    for name, line in found.items():
        assert ({"--model.lora.rank=4", "--model.quantization=nf4"} <= set(line)) == (name in ("sft", "reward", "ppo"))


def test_models_are_handed_on(tmp_path: Path) -> None:
    found = words(tmp_path, BOTH)
    assert "--model.model_path=base" in found["sft"]
    assert "--model.model_path=RUN/sft/export" in found["reward"]
    assert {"--model.model_path=RUN/sft/export", "--model.reward_path=RUN/reward/export"} <= set(found["ppo"])
    assert {"--judge=RewardJudge", "--judge.model=RUN/reward/export"} <= set(found["judge_ppo"])
    theirs = words(tmp_path, BOTH | {"reward_model": "theirs"})
    assert "--model.reward_path=theirs" in theirs["ppo"]
    assert "--reward=theirs" in theirs["margins"]
    own = words(tmp_path, {"model": "base", "prompts": "prompts.jsonl", "reward_function": "my.reward"})
    assert {"--model.model_path=base", "--model.reward_function=my.reward"} <= set(own["ppo"])
    assert "--model=base" in own["generate_sft"]
    assert {"--judge=FunctionJudge", "--judge.function=my.reward"} <= set(own["judge_ppo"])


def test_what_is_shared_reaches_every_stage_that_needs_it(tmp_path: Path) -> None:
    shared = {
        "text": {"max_query_length": 300}, "response_length": 20, "pad_token": "[PAD]", "eos_tokens": ["<e>"],
        "learning_rate": 1e-5, "trainer": {"devices": 2, "strategy": "zero2"},
    }  # fmt: skip
    found = words(tmp_path, BOTH | shared)
    for stage in ("sft", "reward", "ppo"):
        assert {
            "--data.text.max_query_length=300", "--model.pad_token=[PAD]", '--model.eos_tokens=["<e>"]',
            "--model.optimization.learning_rate=1e-05", "--trainer.devices=2", "--trainer.strategy=zero2",
        } <= set(found[stage])  # fmt: skip
    assert {"--model.response_length=20", "--data.text.max_response_length=20"} <= set(found["sft"])
    assert "--model.ppo.response_length=20" in found["ppo"]
    assert {"--response_length=20", '--eos_tokens=["<e>"]', "--text.max_query_length=300"} <= set(found["generate_ppo"])
    assert "--text.max_query_length=300" in found["margins"]
    assert not any("response_length" in word for word in found["reward"])


def test_a_section_wins_over_what_is_shared_and_the_command_line_over_both(tmp_path: Path) -> None:
    section = {"model": {"class_path": "my.PPO", "init_args": {"price": 2, "ppo": {"response_length": 30}}}}
    section["data"] = {"validation": None}
    overrides = {"ppo": {"model.ppo.response_length": "40", "trainer.max_epochs": "3"}}
    found = words(tmp_path, BOTH | {"response_length": 20}, overrides, ppo=section)["ppo"]
    assert found[1:4] == ["--run_dir=RUN/ppo", "--model=my.PPO", "--data=RolloutDataModule"]
    assert [word for word in found if "response_length" in word] == ["--model.ppo.response_length=40"]
    assert {"--model.price=2", "--data.validation=null", "--trainer.max_epochs=3"} <= set(found)
    assert not any(word.startswith("--data.validation.") for word in found)


def test_stages_can_be_left_out(tmp_path: Path) -> None:
    assert list(words(tmp_path, BOTH, reward=False, ppo=False)) == ["sft"]
    assert "--model.model_path=base" in words(tmp_path, BOTH, sft=False)["ppo"]


def test_both_sides_of_a_single_file_are_apart_and_a_folder_has_its_own(tmp_path: Path) -> None:
    found = words(tmp_path, BOTH)
    assert {"--data.train.part=[0.05, 1]", "--data.validation.part=[0, 0.05]"} <= set(found["sft"])
    assert {"--data.demonstrations.part=[0.05, 1]", "--data.train.part=[0.05, 1]"} <= set(found["reward"])
    assert "--data.part=[0, 0.05]" in found["generate_ppo"]
    assert "--data.part=[0, 0.05]" in found["margins"]
    hub = words(tmp_path, BOTH | {"demonstrations": {"path": "owner/name", "split": "train_sft"}})["sft"]
    assert {"--data.train.split=train_sft", "--data.validation.split=validation"} <= set(hub)
    assert not any("part" in word for word in hub)
    fifth = words(tmp_path, BOTH | {"demonstrations": "owner/name", "validation": 0.2})["sft"]
    assert {"--data.train.part=[0.2, 1]", "--data.validation.part=[0, 0.2]"} <= set(fifth)


@pytest.mark.parametrize(
    ("given", "sections", "said"),
    [
        ({}, {}, "model: give the model to start from"),
        ({"model": "base"}, {}, "demonstrations: give demonstrations, comparisons, or prompts"),
        ({"model": "base", "demonstrations": "sft.jsonl"}, {}, "PPO needs rewards"),
        (BOTH | {"validation": 1.5}, {}, "validation is 1.5: it should be a share"),
    ],
)
def test_what_is_missing_is_named(given: dict[str, Any], sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Recipe(Shared(**given), sections)


def test_settings_of_a_stage_that_does_not_run_are_refused() -> None:
    with pytest.raises(UserError, match=r"reward: this pipeline has no such stage, but reward.data.batch_size is set"):
        Recipe(Shared(**BOTH, reward_model="theirs"), {}, {"reward": {"data.batch_size": "4"}})


def test_mere_prompts_have_no_references_so_ppo_is_compared_with_its_start(tmp_path: Path) -> None:
    found = words(tmp_path, {"model": "base", "prompts": "prompts.jsonl", "reward_function": "my.reward"})
    assert "judge_sft" not in found
    start = {"--b.table=RUN/generate_sft.parquet", "--b.column=response", "--b.name=base model"}
    assert start <= set(found["judge_ppo"])
    assert '"policies": {"PPO": "RUN/judge_ppo.parquet"}' in found["report"][-1]


def test_prompts_of_their_own_are_for_ppo_and_the_evaluation_takes_what_has_references(tmp_path: Path) -> None:
    found = words(tmp_path, BOTH | {"prompts": "prompts.jsonl"})
    assert "--data.train.path=prompts.jsonl" in found["ppo"]
    assert "--data.path=sft.jsonl" in found["generate_ppo"]
    assert "--b.column=reference" in found["judge_ppo"]


def test_the_best_export_the_seed_of_the_validation_and_a_part_of_its_own(tmp_path: Path) -> None:
    found = words(tmp_path, BOTH | {"best": "validation/score", "validation_seed": 3})
    assert {"--trainer.callbacks+=Export", "--trainer.callbacks.best=validation/score"} <= set(found["ppo"])
    assert {"--data.train.part_seed=3", "--data.validation.part_seed=3"} <= set(found["sft"])
    part = {"demonstrations": {"path": "sft.jsonl", "part": [0.5, 1]}}
    with pytest.raises(UserError, match=r"validation: sft\.jsonl has a part of its own"):
        words(tmp_path, BOTH | part | {"validation": 0.1})


def test_settings_of_stages_are_taken_out_of_a_command_line() -> None:
    line = ["--model", "m", "--ppo.model.ppo.kl_coefficient", "0.1", "--sft.trainer.max_epochs=2", "--ppo", "false"]
    others, found = split_words(line, SECTIONS)
    assert others == ["--model", "m", "--ppo", "false"]
    assert found == {"ppo": {"model.ppo.kl_coefficient": "0.1"}, "sft": {"trainer.max_epochs": "2"}}
    with pytest.raises(UserError, match=r"--ppo\.data\.batch_size needs a value"):
        split_words(["--ppo.data.batch_size"], SECTIONS)


def test_a_class_in_the_settings_of_a_stage_stays_a_setting(tmp_path: Path) -> None:
    callbacks = [{"class_path": "rlhf.callbacks.last_checkpoint.LastCheckpoint", "init_args": {"every_n_steps": 3}}]
    given = json.dumps({"trainer": {"callbacks": callbacks}})
    parser, config = parsed(pipeline, ["--model=m", f"--sft={given}", '--text={"prompt": "{a}: {b}"}'])
    made = parser.instantiate(config)
    found = words(tmp_path, BOTH | {"text": made.text}, sft=made.sft)
    assert f"--trainer.callbacks={json.dumps(callbacks)}" in found["sft"]
    assert "--data.text.prompt={a}: {b}" in found["sft"]
