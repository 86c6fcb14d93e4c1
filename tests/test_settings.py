"""Every setting of the stages, and every choice it offers, is reachable from a YAML file and arrives."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from rlhf.cli.stage import StageCLI
from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.models.adapters import LoRA
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import eos_ids, load_tokenizer
from rlhf.modules import Optimization, PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.sampling import vllm_engine
from rlhf.synthetic.gold_score import gold_scores

Settings = dict[str, list[Any]]
GOLD = "rlhf.synthetic.gold_score.gold_scores"
MODULE: Settings = {
    "model_path": ["policy"],
    "optimization": [Optimization],
    "pad_token": ["[OTHER]", None],
    "eos_tokens": [["<|endoftext|>"], None],
    "activation_checkpointing": [True, False],
    "lora": [LoRA, None],
    "quantization": ["nf4", None, "int8", None],
}
DATA: Settings = {
    "train": [Source],
    "validation": [Source, None],
    "test": [Source, None],
    "batch_size": [24],
    "micro_batch_size": [3],
    "eval_batch_size": [5],
    "text": [TextFormat],
    "max_tokens_per_micro_batch": [4096, "auto", None],
}
# Values as they stand in YAML; a class stands for its own settings. Round n takes the n-th value of each setting,
# over and over. The first one is never the default.
SETTINGS: dict[type, Settings] = {
    Optimization: {
        "learning_rate": [2e-4],
        "eps": [1e-3],
        "weight_decay": [0.3],
        "schedule": ["constant", "linear", "cosine"],
        "warmup_steps": [7],
        "loss_reduction": ["microbatch", "minibatch"],
    },
    PPOSettings: {
        "response_length": [9],
        "temperature": [1.3],
        "ppo_epochs": [3],
        "minibatches": [2],
        "advantage": ["leave_one_out", "group_normalised", "gae"],
        "samples_per_prompt": [2],
        "gamma": [0.9],
        "lam": [0.5],
        "kl_coefficient": [0.2],
        "kl_in": ["loss", "reward"],
        "kl_estimator": ["k2", "k3", "abs", "k1"],
        "kl_target": [6.0, None],
        "kl_horizon": [500],
        "missing_eos_score": [-2.0, None],
        "missing_eos": ["subtract", "replace"],
        "score_position": ["eos", "after_eos"],
        "whiten_rewards": [True, False],
        "whiten_advantages": ["rank", "off", "global", None],
        "clip": [0.3],
        "value_clip": [None, 0.4],
        "value_coefficient": [0.7],
        "entropy_coefficient": [0.01],
        "critic_warmup": [2],
        "evaluation_temperature": [0.5],
        "cuda_graphs": [False, True, None],
        "vllm_cache_gib": [2.5, 4.0],
        "importance_cap": [1.5, None],
    },
    LoRA: {
        "rank": [4],
        "alpha": [9.0],
        "target_modules": [["dense"], "all-linear"],
        "modules_to_save": [["final_layer_norm"], None],
        "rslora": [True, False],
        "dora": [True, False],
        "dropout": [0.0],
        "export": ["merged", "both", "adapter"],
    },
    TextFormat: {
        "query": ["{post}\n\nTL;DR:"],
        "article": ["{article}\n\nTL;DR:"],
        "max_query_length": [300],
        "max_article_length": [400],
        "max_response_length": [31],
        "max_article_response_length": [33],
        "prompt": ["{question}", None],
        "completion": ["{answer}", None],
        "separator": [" "],
        "join": [" ", None],
        "last_turn": ["ASSISTANT:"],
        "chat_template": ["{{ messages }}", None],
        "special_tokens": ["control", "text"],
        "drop_unfittable": [True, False],
    },
    Source: {
        "path": ["some/records"],
        "split": ["test"],
        "name": ["comparisons", None],
        "revision": ["refs/convert/parquet", None],
        "field": ["data", None],
        "columns": [{"prompt": "question"}, None],
        "part": [[0.1, 0.9], None],
        "part_seed": [3],
        "limit": [5, None],
    },
    SFTModule: MODULE
    | {
        "loss_on": ["response", "all"],
        "assistant_turns": ["every", "last"],
        "response_length": [9],
        "temperature": [0.5],
        "resize_embeddings": [True, False],
    },
    RewardModule: MODULE | {"centering": [0.02]},
    PPOModule: MODULE
    | {
        "reward_path": ["reward", None],
        "reward_function": [GOLD, GOLD, None],
        "evaluation_function": [GOLD, None],
        "reference_path": ["reference", None],
        "reference_placement": ["cpu", "zero3", "device"],
        "reward_placement": ["zero3", "cpu", "device"],
        "ppo": [PPOSettings],
        "sampler": ["vllm", "builtin"],
    },
    SFTDataModule: DATA,
    PreferenceDataModule: DATA | {"demonstrations": [Source, None]},
    RolloutDataModule: DATA | {"rollout_batch_size": [6]},
}
STAGES = [(SFTModule, SFTDataModule), (RewardModule, PreferenceDataModule), (PPOModule, RolloutDataModule)]
ROUNDS = max(len(values) for settings in SETTINGS.values() for values in settings.values())


def parameters(kind: type) -> dict[str, tuple[Any, Any]]:
    """Default and type of every setting."""
    types = get_type_hints(kind if is_dataclass(kind) else kind.__init__)
    return {name: (p.default, types[name]) for name, p in inspect.signature(kind).parameters.items()}


def choices(hint: Any) -> list[Any]:
    """What a type lets one choose from: the words of a Literal, true and false, null."""
    if hint is bool:
        return [True, False]
    arguments = get_args(hint)
    return list(arguments) if get_origin(hint) is Literal else [None] * (type(None) in arguments)


def in_round(kind: type, number: int) -> dict[str, Any]:
    """The settings of a class in a round."""
    return {name: values[number % len(values)] for name, values in SETTINGS[kind].items()}


def as_yaml(kind: type, number: int) -> dict[str, Any]:
    """The same, as plain values."""
    return {name: as_yaml(v, number) if isinstance(v, type) else v for name, v in in_round(kind, number).items()}


def arrived(kind: type, number: int) -> dict[str, Any]:
    """The same, as the objects that a module or DataModule gets."""
    chosen = in_round(kind, number)
    return {name: v(**as_yaml(v, number)) if isinstance(v, type) else v for name, v in chosen.items()}


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_setting_and_every_choice_is_named_here(kind: type) -> None:
    assert set(SETTINGS[kind]) == set(parameters(kind))
    for name, (default, hint) in parameters(kind).items():
        assert SETTINGS[kind][name][0] != default or name == "dropout", name  # which can only be 0
        assert all(choice in SETTINGS[kind][name] for choice in choices(hint)), name


@pytest.fixture
def folder(tmp_path: Path, model_path: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a policy, a reference and a reward model, in which no run takes a step."""
    monkeypatch.setattr(vllm_engine, "find_spec", lambda _: True)
    shutil.copytree(model_path, tmp_path / "policy")
    shutil.copytree(model_path, tmp_path / "reference")
    ScalarModel.from_policy(model_path, 3).save(tmp_path / "reward", load_tokenizer(model_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StageCLI, "_run_subcommand", lambda self, verb: None)
    return tmp_path


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize(("module", "data"), STAGES, ids=lambda kind: kind.__name__)
def test_settings_arrive_from_yaml(module: type, data: type, number: int, folder: Path) -> None:
    trainer = {"gradient_clip_val": 0.7, "gradient_clip_algorithm": "value", "max_epochs": 11}
    config = {
        "run_dir": "run",
        "seed_everything": 5 + number,
        "trainer": trainer | {"accelerator": "cpu"},
        "model": {"class_path": module.__name__, "init_args": as_yaml(module, number)},
        "data": {"class_path": data.__name__, "init_args": as_yaml(data, number)},
    }
    (folder / "stage.yaml").write_text(yaml.safe_dump(config))
    cli = StageCLI.run(["fit", "--config=stage.yaml"])
    for name, value in arrived(module, number).items():
        if name == "pad_token":
            assert cli.model.tokenizer.pad_token == (value or "[PAD]")
        elif name == "eos_tokens":
            assert eos_ids(cli.model.tokenizer) == (cli.model.tokenizer.eos_token_id,)
        elif value == GOLD:
            assert getattr(cli.model, name) is gold_scores
        elif name == "reference_path":
            assert cli.model.reference_path == (value or "policy")
        else:
            assert getattr(cli.model, name) == value, name
    for name, value in arrived(data, number).items():
        place = cli.datamodule.sources if name in cli.datamodule.sources else vars(cli.datamodule)
        assert place[name] == value, name
    assert {name: getattr(cli.trainer, name) for name in trainer} == trainer
    assert cli.model.seed == 5 + number
