"""Looks at the stages of a pipeline with the code that they use themselves; no weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from typing_extensions import override

from rlhf import files
from rlhf.cli.disk import Disks
from rlhf.cli.main import VERBS, own_names, parsed
from rlhf.cli.parsing import message_of
from rlhf.cli.stage import StageCLI
from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source, load_records
from rlhf.data.stage_data import StageDataModule
from rlhf.data.tokenising import load_comparisons, load_demonstrations, rows_of_part
from rlhf.errors import UserError
from rlhf.models.classifiers import AUTO_CLASS, classifier_config
from rlhf.models.library_calls import first_line
from rlhf.models.saving import save_without_weights
from rlhf.models.tokenizers import PAD_TOKEN, check_reference, load_tokenizer
from rlhf.modules import PPOModule, StageModule
from rlhf.modules.ppo_models import check_run

HEAD = 100  # records that are read of every file


def rehearse(task: str, output: str) -> None:
    """Writes a list of sentences, what is wrong with the stages of a pipeline, to a JSON file.

    Args:
        task: JSON file with the arguments of `rlhf.studies.preflight.complaints`.
        output: the file to write.
    """
    given = json.loads(Path(task).read_text())
    files.write_text(Path(output), json.dumps(sentences(given["jobs"], given["stand_ins"])))


def sentences(jobs: list[tuple[str, list[str]]], stand_ins: dict[str, str]) -> list[str]:
    """Does what `rlhf.studies.preflight.complaints` describes, in this process."""
    with TemporaryDirectory() as folder:
        rehearsal = Rehearsal(stand_ins, Path(folder))
        for name, words in jobs:
            rehearsal.look_at(name, words)
        for name, sentence in rehearsal.disks.complaints():
            rehearsal.add(name, sentence)
        return [f"{', '.join(stages)}: {sentence}" for sentence, stages in rehearsal.found.items()]


class ParsedCLI(StageCLI):
    """A stage whose command line is parsed, and whose objects are made one by one."""

    @override
    def before_instantiate_classes(self) -> None:
        pass

    @override
    def instantiate_classes(self) -> None:
        pass

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def make(self, settings: Namespace, name: str) -> Any:
        """Makes the `model`, the `data` or the `trainer`."""
        others = dict.fromkeys({"model", "data", "trainer"} - {name})
        self.config_init = self._parser(self.subcommand).instantiate(Namespace(**{**vars(settings), **others}))
        return self.instantiate_trainer() if name == "trainer" else self.config_init[name]


class _NoTokenizerError(Exception):
    """Records are fine up to where a tokenizer is needed."""


class _NoTokenizer:
    def __getattr__(self, name: str) -> Any:
        raise _NoTokenizerError


class Rehearsal:
    """Collects what is wrong with stages that follow one another.

    What a stage would export is written without weights, and later stages look at that.
    """

    def __init__(self, stand_ins: dict[str, str], folder: Path) -> None:
        self.stand_ins = {_plain(path): found for path, found in stand_ins.items()}
        self.folder = folder
        self.exports: dict[str, str] = {}  # path of an export -> the folder that has all of it but the weights
        self.found: dict[str, list[str]] = {}  # sentence -> stages
        self.disks = Disks()
        self._tokenizers: dict[str, Any] = {}

    def look_at(self, name: str, words: list[str]) -> None:
        """Looks at a stage."""
        with self.collecting(name):
            if words[0] == "fit":
                self._fit(name, words)
            else:
                function = getattr(import_module(VERBS[words[0]][0]), words[0])
                parser, config = parsed(function, words[1:])
                arguments = SimpleNamespace(**vars(parser.instantiate(self.with_exports(config))))
                look: Any = getattr(self, f"_{words[0]}", None)
                if look is not None:
                    look(name, arguments, config)

    def add(self, name: str, sentence: str) -> None:
        """Adds a sentence about a stage, which speaks of the export itself where it was about its stand-in."""
        for path, folder in self.exports.items():
            sentence = sentence.replace(folder, path)
        stages = self.found.setdefault(sentence, [])
        if name not in stages:
            stages.append(name)

    @contextmanager
    def collecting(self, name: str) -> Iterator[None]:
        """Adds the error of a block."""
        try:
            yield
        except Exception as error:  # whatever would stop the stage, such as an import of a user's own class
            self.add(name, message_of(error) or f"{type(error).__name__}: {first_line(error)}")

    # ------------------------------------------------------------------------------------------------- stand-ins

    def with_exports(self, settings: Any) -> Any:
        """Returns settings with what was written in the place of exports that are still to come."""
        if isinstance(settings, Namespace):
            return Namespace(**{key: self.with_exports(value) for key, value in vars(settings).items()})
        if isinstance(settings, dict):
            return {key: self.with_exports(value) for key, value in settings.items()}
        if isinstance(settings, list | tuple):
            return type(settings)(map(self.with_exports, settings))
        return self.exports.get(_plain(settings), settings) if isinstance(settings, str) else settings

    def lacks(self, settings: Any) -> bool:
        """Tells whether settings name something that is still to come, and that nothing stands in for."""
        if isinstance(settings, Namespace | dict):
            return any(
                map(self.lacks, vars(settings).values() if isinstance(settings, Namespace) else settings.values())
            )
        if isinstance(settings, list | tuple):
            return any(map(self.lacks, settings))
        if not isinstance(settings, str) or (path := _plain(settings)) in self.exports:
            return False
        return path in self.stand_ins or any(str(p) in self.stand_ins for p in Path(path).parents)

    def some_tokenizer(self, path: str | None, eos_tokens: list[str] | None = None) -> Any:
        """Returns the tokenizer of a model, or of what stands in for it, with a new PAD if its own will not do."""
        there = self.stand_ins.get(_plain(path or ""), path) or ""
        if there not in self._tokenizers:  # without a network a name on the hub takes long to be refused
            self._tokenizers[there] = _NoTokenizer()
            with suppress(UserError):
                self._tokenizers[there] = load_tokenizer(there, PAD_TOKEN, eos_tokens=eos_tokens)
        return self._tokenizers[there]

    # ---------------------------------------------------------------------------------------------------- training

    def _fit(self, name: str, words: list[str]) -> None:
        cli: Any = ParsedCLI.run(words)
        given = cli.config["fit"]
        settings = self.with_exports(given)
        trainer = module = data = None
        with self.collecting(name):
            files.check_writable(Path(given.run_dir), "run_dir")
        with self.collecting(name):
            cli._find_checkpoint(settings)
        with self.collecting(name):
            trainer = cli.make(settings, "trainer")
        with self.collecting(name):
            module = None if self.lacks(given.model) else cli.make(settings, "model")
        with self.collecting(name):
            made = cli.make(settings, "data")
            if module is not None:
                module.check_data(made)
            data = made
        if data is not None:
            model = settings.model.init_args
            tokenizer = None if module else self.some_tokenizer(model.get("model_path"), model.get("eos_tokens"))
            seen = module or SimpleNamespace(tokenizer=tokenizer)
            if trainer is not None and module is not None:
                trainer.strategy.connect(module)
                data.trainer = trainer
            else:
                data.trainer = SimpleNamespace(lightning_module=seen)
            whole = self._read(name, data)
            if module is not None:
                self._check(name, data, module, trainer, whole)
        if module is not None:
            self._export(name, module, Path(given.run_dir))
            if trainer is not None:
                with self.collecting(name):
                    self.disks.add(name, Path(given.run_dir), module, trainer)

    def _read(self, name: str, data: StageDataModule) -> set[str]:
        """Reads the head of every file; returns the names of the splits that it is all of."""
        whole = set()
        for split, source in data.sources.items():
            if source is None or self.lacks(source.path):
                continue
            with self.collecting(name):
                head = _head(source, max(HEAD, data.batch_size))
                with suppress(_NoTokenizerError):
                    data.splits |= data.load_split(split, head)
                if (head.limit == source.limit and source.part is None) or len(load_records(head, f"data.{split}")) < (
                    head.limit or 0
                ):
                    whole.add(split)
                    if source.part is not None and split in data.splits:
                        rows_of_part(data.splits[split], source, f"data.{split}")
        return whole

    def _check(
        self, name: str, data: StageDataModule, module: StageModule, trainer: Trainer | None, whole: set[str]
    ) -> None:
        """Checks what module, data and Trainer want of each other."""
        budget, ready = data.max_tokens_per_micro_batch, "train" in data.splits
        with self.collecting(name):
            if any(map(len, data.splits.values())):
                data.check_rows()
        with self.collecting(name):
            # The memory of a device is asked for when the stage begins, and updates of PPO are too many to count.
            if trainer is not None and (budget is None or (isinstance(budget, int) and ready and module.kind != "ppo")):
                data.set_accumulation()
        with self.collecting(name):
            if trainer is not None:
                module.check_schedule(trainer)
        if isinstance(data, RolloutDataModule) and isinstance(module, PPOModule):
            with self.collecting(name):
                data.check_horizon()
            with self.collecting(name):
                if ready and "train" in whole:
                    data.check_prompts()
            with self.collecting(name):
                if trainer is not None:
                    there: Any = SimpleNamespace(datamodule=data, strategy=trainer.strategy)
                    check_run(there, module.ppo, module.placements, module.reward_tokenizer, module.lora)
        with self.collecting(name):
            if trainer is not None and "validation" in whole & data.splits.keys():
                data.val_dataloader()

    def _export(self, name: str, module: StageModule, run: Path) -> None:
        """Writes what the stage would export, but its weights, for all of its exports that are still to come."""
        own = {path for path in self.stand_ins if Path(path).parent == Path(_plain(str(run)))}
        if not files.is_complete(run / files.EXPORT):
            own.add(_plain(str(run / files.EXPORT)))
        folder = self.folder / str(len(self.exports))
        with self.collecting(name):
            config = module.model_config
            if module.kind == "reward":
                config = classifier_config(config)
                config.architectures = [_classifier_name(config)]
            config.get_text_config().vocab_size = module.embedding_rows
            folder.mkdir()
            save_without_weights(config, module.model_path, module.tokenizer, folder, "model.model_path")
            self.exports |= dict.fromkeys(own, str(folder))

    # -------------------------------------------------------------------------------------------------- evaluation

    def _output(self, name: str, output: str) -> None:
        from rlhf.evaluation.tables import check_suffix

        with self.collecting(name):
            check_suffix(Path(output), "output")
            files.check_writable(Path(output).parent, "output")

    def _generate(self, name: str, given: SimpleNamespace, config: Namespace) -> None:
        from rlhf.evaluation.best_of_n import check_best_of
        from rlhf.evaluation.generate import check_models, check_records, check_sampler

        self._output(name, given.output)
        with self.collecting(name):
            check_sampler(given.sampler, given.vllm_cache_gib, given.temperature)
        with self.collecting(name):
            check_best_of(given.best_of, given.reward, given.reference)
        tokenizer, reward = None, None if self.lacks(config.reward) else given.reward
        if not self.lacks(config.model):
            with self.collecting(name), own_names():
                tokenizer = check_models(given.model, reward, given.eos_tokens)
                if given.reference is not None and not self.lacks(config.reference):
                    check_reference(given.reference, "reference", tokenizer)
        with self.collecting(name), own_names(), suppress(_NoTokenizerError):
            if not self.lacks(given.data.path):
                seen = tokenizer or self.some_tokenizer(config.model, given.eos_tokens)
                records = load_demonstrations(
                    _head(given.data), "data", seen, given.text, need_response=False
                ).to_list()
                if tokenizer is not None:
                    check_records(records, given.model, tokenizer, given.response_length, reward)

    def _margins(self, name: str, given: SimpleNamespace, config: Namespace) -> None:
        from rlhf.evaluation.margins import check_model

        self._output(name, given.output)
        tokenizer = None
        if not self.lacks(config.reward):
            with self.collecting(name), own_names():
                tokenizer = check_model(given.reward, given.reference)
        with self.collecting(name), own_names(), suppress(_NoTokenizerError):
            if not self.lacks(given.data.path):
                load_comparisons(_head(given.data), "data", tokenizer or self.some_tokenizer(config.reward), given.text)

    def _judge(self, name: str, given: SimpleNamespace, config: Namespace) -> None:
        from rlhf.evaluation.pairwise import join

        self._output(name, given.output)
        with self.collecting(name):
            if not self.lacks(config.judge):
                given.judge.check()
        with self.collecting(name):
            if not self.lacks([given.a.table, given.b.table]):
                join(given.a, given.b, given.only_shared)

    def _report(self, name: str, given: SimpleNamespace, config: Namespace) -> None:
        from rlhf.report.report import check_runs
        from rlhf.report.runs import judged_rows, margin_rows

        with self.collecting(name):
            files.check_writable(Path(given.output), "output")
        with self.collecting(name):
            runs = check_runs(given.runs, given.baselines)
            for run in runs:
                if policies := {label: path for label, path in run.policies.items() if not self.lacks(path)}:
                    judged_rows([replace(run, policies=policies)])
                checkpoints = {update: path for update, path in run.checkpoints.items() if not self.lacks(path)}
                judged_rows([replace(run, checkpoints=checkpoints)], "update")
            margin_rows(run for run in runs if not self.lacks(run.margins))


def _plain(path: str) -> str:
    return str(Path(path)) if path else ""


def _head(source: Source, records: int = HEAD) -> Source:
    return replace(source, part=None, limit=min(records, source.limit or records))  # of a part all would be read


def _classifier_name(config: Any) -> str:
    import transformers

    return str(getattr(transformers, AUTO_CLASS)._model_mapping[type(config)].__name__)
