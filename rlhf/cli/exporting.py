"""Exports a checkpoint of any stage in Hugging Face format, with a model card, to a folder and to the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer, seed_everything

from rlhf import files
from rlhf.callbacks.checkpoint_io import find_last, read_weights
from rlhf.callbacks.dropout import disable_dropout
from rlhf.callbacks.export import read_manifest, write_export
from rlhf.cli.hub import Hub
from rlhf.cli.parsing import parse
from rlhf.data.stage_data import StageDataModule
from rlhf.errors import UserError
from rlhf.models.adapter_files import ADAPTER_FILE, base_of
from rlhf.modules import StageModule
from rlhf.report.model_card import CARD, model_card
from rlhf.seeding import DEFAULT_SEED


def export(
    checkpoint: str,
    output: str,
    push_to_hub: str | None = None,
    public: bool = False,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> Path:
    """Writes the model of a checkpoint in Hugging Face format, as the end of `fit` does, with a model card.

    Takes a checkpoint of SFT, reward model or PPO, of one process or many; needs no GPU. The run's `config.yaml`, one
    folder up, says what it is of. PPO: the policy, and the critic in the folder `critic`. Reward model: the data of
    `data.demonstrations` is read again, to shift the rewards.

    Args:
        checkpoint: file or (under ZeRO) folder in `checkpoints` of a run folder; or that run folder, of which the last
            one is taken; or an export of the run, such as `export_best`, which is copied.
        output: folder to write; it must not exist.
        push_to_hub: repository on the hub to upload it to, as `owner/name`, which is created if there is none. Log in
            with `hf auth login`, or set HF_TOKEN.
        public: whether everybody may see that repository; else it is private.
        model: settings of the module to replace, where the run's no longer hold, such as a `model_path` that moved.
        data: likewise of the DataModule.
    """
    source, folder = Path(checkpoint), Path(output)
    if not source.exists():
        raise UserError(f"checkpoint: there is no checkpoint {source}.")
    if folder.exists():
        raise UserError(f"output: {folder} exists already; choose another folder.")
    copied = files.is_complete(source)
    if not copied and (source / files.CONFIG).is_file():  # a run folder
        last = find_last(source / files.CHECKPOINTS)
        if last is None:
            raise UserError(f"checkpoint: there is no checkpoint in {source / files.CHECKPOINTS}.")
        source = last
    run = source.resolve().parent if copied else source.resolve().parent.parent
    config = _read_config(run / files.CONFIG, source)
    hub = Hub(push_to_hub, public) if push_to_hub else None
    with files.owned(folder, "output", beside=True), files.replacing(folder) as partial:
        if copied:
            shutil.copytree(source, partial)
        else:
            given = {"model": {"init_args": model or {}}, "data": {"init_args": data or {}}}
            _convert(source, partial, _replaced(config, given))
        (partial / CARD).write_text(model_card(run, config, partial, push_to_hub or folder.name))
        notes = read_manifest(partial)
        if hub is not None:
            _check_bases(partial)
    print(f"Exported: {folder}", flush=True)
    if hub is not None:
        address = hub.upload(folder, f"{notes['stage']} after {notes['steps']} steps")
        print(f"Uploaded: {address}", flush=True)
    return folder


def _check_bases(export: Path) -> None:
    """Refuses to upload adapters that nobody else could load."""
    for file in export.rglob(ADAPTER_FILE):
        if Path(base := base_of(str(file.parent), "push_to_hub")).expanduser().is_dir():
            raise UserError(
                f"push_to_hub: this is an adapter of {base}, a folder of this machine; export it merged "
                "(--model.lora.export merged), or train it on a base that is on the hub."
            )


def _read_config(file: Path, source: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"checkpoint: {source} is in no run folder: there is no {file}, which says what it is of.")
    return yaml.safe_load(file.read_text())


def _replaced(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns nested settings with some replaced."""
    nested = {key: _replaced(settings.get(key) or {}, new) for key, new in given.items() if isinstance(new, dict)}
    return settings | given | nested


def _convert(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """Builds the module, gives it the weights of a checkpoint, and writes it."""
    try:
        state = read_weights(source)
    except UserError as error:
        raise UserError(str(error).replace("ckpt_path:", "checkpoint:")) from error
    done = {"epochs": state["epoch"], "steps": state["global_step"]}
    name = config["model"]["class_path"].rpartition(".")[2]
    print(f"{source}: {name}, epoch (PPO: update) {done['epochs']}, step {done['steps']}", flush=True)
    seed_everything(config.get("seed_everything", DEFAULT_SEED), verbose=False)
    module, datamodule = _built(config)
    precision = config["trainer"].get("precision")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision if precision == "bf16-mixed" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.strategy.connect(module)
    module.trainer = datamodule.trainer = trainer
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    if module.kind == "reward":
        datamodule.sources = {"demonstrations": datamodule.sources.get("demonstrations")}
        datamodule.load()
    module.configure_model()
    module.eval()
    disable_dropout(module)  # as in training; the exported configuration says so
    module.check_state(state["state_dict"], f"checkpoint: {source}")
    module.load_state_dict(state["state_dict"])
    module.prepare_export()
    write_export(module, folder, **done)


def _built(config: dict[str, Any]) -> tuple[StageModule, StageDataModule]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(StageModule, "model")
    parser.add_subclass_arguments(StageDataModule, "data")
    words = [f"--{key}={json.dumps(config[key])}" for key in ("model", "data")]
    built = parser.instantiate(parse(parser, words))
    return built.model, built.data
