"""From what the stages of a pipeline share to the stages themselves: it alone says which setting goes where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rlhf.data.readers import parse_name
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.studies.runner import Settings, Stage

TRAINED = {  # stage -> its module and its DataModule
    "sft": ("SFTModule", "SFTDataModule"),
    "reward": ("RewardModule", "PreferenceDataModule"),
    "ppo": ("PPOModule", "RolloutDataModule"),
}
SECTIONS = ("synthesize", *TRAINED, "generate", "margins", "report")  # parts of a pipeline with settings of their own
CENTERED = 1024  # demonstrations whose mean reward becomes 0
VALIDATED = 512  # prompts that PPO validates on; the evaluation takes all
SHARE = 0.05  # of the queries of a single file that are kept for validation


@dataclass(frozen=True)
class Shared:
    """What the stages of a pipeline share; `rlhf.studies.pipeline.pipeline` describes it."""

    model: str | None = None
    demonstrations: str | Source | Settings | None = None
    comparisons: str | Source | Settings | None = None
    prompts: str | Source | Settings | None = None
    validation: float | None = None
    validation_seed: int = 0
    reward_model: str | None = None
    reward_function: str | None = None
    judge: str | Settings | None = None
    text: Settings = field(default_factory=dict)
    response_length: int | None = None
    pad_token: str | None = None
    eos_tokens: list[str] | None = None
    learning_rate: float | str | None = None
    best: str | None = None
    lora: Settings | None = None
    quantization: str | None = None
    trainer: Settings = field(default_factory=dict)


class Recipe:
    """Composes the stages of a pipeline.

    Args:
        shared: what they share.
        sections: name of a section -> its settings, or False to leave that stage out.
        overrides: name of a section -> settings by dotted key, which win.
        size: what the report calls the size of the model.
    """

    def __init__(
        self,
        shared: Shared,
        sections: Mapping[str, Settings | bool | None],
        overrides: Mapping[str, Settings] | None = None,
        size: str = "run",
    ) -> None:
        self.shared, self.sections, self.overrides, self.size = shared, sections, overrides or {}, size
        self.model = shared.model and shared.model.replace("{size}", size)
        makes_data = bool(sections.get("synthesize"))
        self.demonstrations = shared.demonstrations or ("{run}/data/demonstrations" if makes_data else None)
        self.comparisons = shared.comparisons or ("{run}/data/comparisons" if makes_data else None)
        self.references = self.demonstrations or self.comparisons  # responses to compare with; mere prompts have none
        self.prompts = shared.prompts or self.references
        self._check()
        unsaid = shared.learning_rate is None and not any(self._names_files(name) for name in TRAINED)
        proposed = shared.learning_rate == "auto" or unsaid
        self.learning_rate = self._proposed() if proposed else shared.learning_rate

    def _check(self) -> None:
        shared = self.shared
        self._check_overrides()
        if shared.model is None:
            raise UserError("model: give the model to start from, a folder or a name on the hub.")
        if self.prompts is None:
            raise UserError("demonstrations: give demonstrations, comparisons, or prompts and a reward_function.")
        if self.runs("ppo") and not (self.runs("reward") or shared.reward_model or shared.reward_function):
            raise UserError(
                "comparisons: PPO needs rewards; give comparisons to train a reward model on, a reward_model, or a "
                "reward_function."
            )
        if shared.validation is not None and not 0 < shared.validation < 1:
            raise UserError(f"validation is {shared.validation}: it should be a share above 0 and below 1.")

    def _names_files(self, name: str) -> bool:
        """Tells whether the section of a stage names files, which have its classes and its learning rate."""
        section = self.sections.get(name)
        return isinstance(section, Mapping) and "config" in section

    def _check_overrides(self) -> None:
        """Refuses settings, typed for this run, of a stage that is not part of it."""
        for name in self.overrides:
            if not self.runs(name if name in (*TRAINED, "synthesize") else "ppo"):
                raise UserError(
                    f"{name}: this pipeline has no such stage, but {name}.{min(self.overrides[name])} is set."
                )

    def _proposed(self) -> float | None:
        """Returns the usual learning rate for the size of the model, if it can be loaded."""
        from rlhf.models.learning_rates import proposed_learning_rate
        from rlhf.models.loading import load_config
        from rlhf.models.memory import trained_parameters

        try:
            parameters = trained_parameters(load_config(str(self.model), "model"), "sft")
        except UserError:  # said by the stage that loads it
            return None
        rate = proposed_learning_rate(parameters, self.shared.lora is not None)
        print(f"learning_rate: {rate:g}, a rule of thumb for a model of {parameters / 1e6:,.1f} million parameters")
        return rate

    def runs(self, name: str) -> bool:
        """Tells whether a stage is part of the pipeline."""
        if self.sections.get(name) is False:
            return False
        needs = {
            "synthesize": self.sections.get("synthesize") or None,
            "sft": self.references,
            "reward": None if self.shared.reward_model or self.shared.reward_function else self.comparisons,
            "ppo": self.prompts,
        }
        return needs[name] is not None

    @property
    def start(self) -> str:
        """The policy that PPO starts from."""
        return "{run}/sft/export" if self.runs("sft") else str(self.model)

    @property
    def reward(self) -> str | None:
        """The reward model, if there is one."""
        return "{run}/reward/export" if self.runs("reward") else self.shared.reward_model

    def stages(self) -> list[Stage]:
        """Returns the stages of the pipeline, in order."""
        stages = [self._trained(name) for name in TRAINED if self.runs(name)]
        if self.runs("synthesize"):
            stages.insert(0, self._stage("data", "synthesize", {}, {}, "synthesize"))
        return [*stages, *(self._evaluated() if self.runs("ppo") else [])]

    def _stage(self, name: str, command: Any, takes: Settings, settings: Settings, section: str | None = None) -> Stage:
        """Returns a stage with the settings of its section, which win, and its overrides, which win over them."""
        own = self.sections.get(section or name)
        own = dict(own) if isinstance(own, Mapping) else {}
        config = own.pop("config", None)
        if config is not None:
            config = [name.format(size=self.size) for name in ([config] if isinstance(config, str) else config)]
        own = dict(_flat(own)) | dict(self.overrides.get(section or name, {}))
        takes, kept = ({k: v for k, v in given.items() if not _within(k, own)} for given in (takes, settings))
        return Stage(name, command, config, takes, kept | own)

    def _trained(self, name: str) -> Stage:
        shared, (module, data) = self.shared, TRAINED[name]
        takes: Settings = {} if self._names_files(name) else {"model": module, "data": data}
        takes["model.model_path"] = str(self.model) if name == "sft" else self.start
        if name == "ppo" and self.reward is not None:
            takes["model.reward_path"] = self.reward
        for key, source in self._sources(name).items():
            takes |= {f"data.{key}.{part}": value for part, value in source.items()}
        settings: Settings = {
            "model.optimization.learning_rate": self.learning_rate,
            "model.pad_token": shared.pad_token,
            "model.eos_tokens": shared.eos_tokens,
            "model.quantization": shared.quantization,
            "model.reward_function": shared.reward_function if name == "ppo" else None,
            "model.response_length": shared.response_length if name == "sft" else None,
            "data.text.max_response_length": shared.response_length if name == "sft" else None,
            "model.ppo.response_length": shared.response_length if name == "ppo" else None,
        }
        settings |= {f"data.text.{key}": value for key, value in shared.text.items()}
        settings |= {f"model.lora.{key}": value for key, value in (shared.lora or {}).items()}
        settings |= dict(_flat({"trainer": shared.trainer} if shared.trainer else {}))
        if name == "ppo" and shared.best is not None:
            settings |= {"trainer.callbacks+": "Export", "trainer.callbacks.best": shared.best}
        return self._stage(name, "fit", takes, {key: value for key, value in settings.items() if value is not None})

    def _sources(self, name: str) -> dict[str, Settings]:
        """Returns the sources of a stage: `train`, `validation`, `demonstrations` -> settings of a `Source`."""
        records = {"sft": self.references, "reward": self.comparisons, "ppo": self.prompts}[name]
        sources = {"train": self._side(records, "train"), "validation": self._side(records, "validation")}
        if name == "reward" and self.demonstrations is not None:
            sources["demonstrations"] = {**self._side(self.demonstrations, "train"), "limit": CENTERED}
        if name == "ppo" and not self._names_files(name):
            sources["validation"] = {"limit": VALIDATED} | sources["validation"]
        return sources

    def _side(self, records: str | Source | Settings | None, side: Literal["train", "validation"]) -> Settings:
        """Returns the settings of the training or validation side of records.

        A folder or hub dataset has a split for each; a single file, or all with `validation`, is shared out by queries.
        """
        given = {"path": records} if isinstance(records, str) else records
        given = asdict(given) if isinstance(given, Source) else given or {}
        source = {key: value for key, value in given.items() if value is not None}
        path = Path(str(source["path"])).expanduser()
        single = path.is_file() or (not path.exists() and parse_name(path).kind)
        share = self.shared.validation or (SHARE if single and "part" not in source else None)
        if share is not None and "part" in source:
            raise UserError(f"validation: {source['path']} has a part of its own; give one of the two.")
        if self.shared.validation_seed:
            source["part_seed"] = self.shared.validation_seed
        if share is None:
            return source if side == "train" else source | {"split": "validation"}
        return source | {"part": [share, 1] if side == "train" else [0, share]}

    def _evaluated(self) -> Iterator[Stage]:
        shared = self.shared
        queries = self.prompts if self.references is None else self.references
        prompts = {f"data.{key}": value for key, value in self._side(queries, "validation").items()}
        takes: dict[str, Settings] = {"generate": prompts, "judge": self._judge()}
        margins = self.reward is not None and self.comparisons is not None and self.sections.get("margins") is not False
        if margins:
            side = self._side(self.comparisons, "validation").items()
            takes["margins"] = {f"data.{key}": value for key, value in side}
        text = {f"text.{key}": value for key, value in shared.text.items()}
        generate = {"response_length": shared.response_length, "eos_tokens": shared.eos_tokens} | text
        settings = {"generate": {key: value for key, value in generate.items() if value is not None}, "margins": text}
        for stage in evaluation_stages(takes, self.start, self.reward):
            if stage.command == "judge":  # its section is the judge itself
                if self.references is None:  # then PPO is compared with the policy that it started from
                    if stage.name == "judge_sft":
                        continue
                    name = "SFT" if self.runs("sft") else "base model"
                    before = {"b.table": "{run}/generate_sft.parquet", "b.column": "response", "b.name": name}
                    stage = replace(stage, takes=stage.takes | before)
                own = {f"judge.{key}": value for key, value in self.overrides.get("judge", {}).items()}
                yield replace(stage, settings=own)
            elif stage.command == "generate" or margins:
                own = settings[stage.command]
                yield self._stage(stage.name, stage.command, stage.takes, own, stage.command)
        yield self._report(margins)

    def _judge(self) -> Settings:
        if self.shared.judge is not None:
            return {"judge": self.shared.judge}
        if self.reward is not None:
            return {"judge": "RewardJudge", "judge.model": self.reward}
        return {"judge": "FunctionJudge", "judge.function": self.shared.reward_function}

    def _report(self, margins: bool) -> Stage:
        run: Settings = {
            "size": self.size,
            "seed": "{seed}",
            "policies": {
                label: f"{{run}}/judge_{label.lower()}.parquet"
                for label in (("SFT", "PPO") if self.references is not None else ("PPO",))
            },
            "stages": {name: f"{{run}}/{name}" for name in TRAINED if self.runs(name)},
        }
        if margins:
            run["margins"] = "{run}/margins.parquet"
        return self._stage("report", "report", {"runs": [run]}, {})


def evaluation_stages(
    takes: Mapping[str, Settings], start: str = "{run}/sft/export", reward: str | None = "{run}/reward/export"
) -> list[Stage]:
    """Returns what a pipeline or a study ends with, but for its report.

    These are the responses of the policies before and after PPO to the validation prompts, judgements of them against
    the references, and the margins of the reward model.

    Args:
        takes: command -> settings that its stages take, such as `data.path` of `generate` and `judge` of `judge`.
        start: the policy that PPO starts from.
        reward: the reward model.
    """
    for command in takes.keys() - {"generate", "judge", "margins"}:
        raise UserError(f"evaluation: no stage of the evaluation has the command {command!r}.")
    policies = {"sft": start, "ppo": "{run}/ppo/export"}
    generated = [
        Stage(f"generate_{policy}", "generate", takes={"model": model, "reward": reward, **takes.get("generate", {})})
        for policy, model in policies.items()
    ]
    judged = [judge_stage(policy, policy.upper(), takes.get("judge", {})) for policy in policies]
    return [*generated, *judged, Stage("margins", "margins", takes={"reward": reward, **takes.get("margins", {})})]


def judge_stage(name: str, label: str, takes: Settings) -> Stage:
    """Returns the stage that judges the responses of `generate_<name>` against the references."""
    table = f"{{run}}/generate_{name}.parquet"
    sides = {"a.table": table, "a.name": label, "b.table": table, "b.column": "reference"}
    return Stage(f"judge_{name}", "judge", takes=sides | takes)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values; the class and the arguments of an object are settings like others."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if not isinstance(value, Mapping) or key == "columns" or not value:
            yield name, value
        elif prefix == "" and key in ("model", "data") and "class_path" in value:
            yield name, value["class_path"]
            yield from _flat(value.get("init_args", {}), f"{name}.")
        elif "class_path" in value:
            yield name, dict(value)
        else:
            yield from _flat(value, f"{name}.")


def _within(key: str, others: Settings) -> bool:
    """Tells whether a level above a key is among others; `model` and `data` are names of classes."""
    return any(key.startswith(f"{other}.") for other in others if other not in ("model", "data"))
