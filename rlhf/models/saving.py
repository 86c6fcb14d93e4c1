"""Models on disk in Hugging Face format, and a rehearsal of it before anything is trained."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from rlhf.errors import UserError
from rlhf.models.adapter_files import CONFIG_FILE
from rlhf.models.adapters import is_adapted, save_adapter
from rlhf.models.library_calls import first_line, quiet
from rlhf.models.loading import load_config, load_generation_config
from rlhf.models.tokenizers import eos_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model and its tokenizer in Hugging Face format, with PAD and all EOS ids in the configuration.

    Of a model with an adapter the adapter is written, in the format of peft, beside the configuration.
    """
    _set_tokens(model.config, tokenizer)
    with quiet():
        if getattr(model, "generation_config", None) is not None:
            model.generation_config, _ = _exportable(model.generation_config, tokenizer)
        if is_adapted(model):
            folder.mkdir(parents=True, exist_ok=True)
            model.config.architectures = [type(model).__name__]
            model.config.to_json_file(folder / CONFIG_FILE)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            save_adapter(model, folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def rehearse_export(path: str, tokenizer: PreTrainedTokenizerBase, setting: str = "model.model_path") -> None:
    """Writes all of an export but its weights to a temporary folder, so that a fault shows before the training."""
    with TemporaryDirectory() as folder:
        problem = save_without_weights(load_config(path, setting), path, tokenizer, Path(folder), setting)
    if problem:
        rank_zero_info(
            f"{setting}: the generation_config.json of {path} contradicts itself, so that it cannot be written again; "
            f"exports keep its special tokens only, and sampling here uses nothing else of it. {problem}"
        )


def save_without_weights(
    config: PreTrainedConfig, path: str, tokenizer: PreTrainedTokenizerBase, folder: Path, setting: str
) -> str:
    """Writes all of an export of a model with this configuration but its weights.

    Args:
        path: the model that is trained, which has the generation configuration.

    Returns:
        What is wrong with that, so that it cannot be written whole.
    """
    found, _ = load_generation_config(path, config)
    _set_tokens(config, tokenizer)
    with quiet():
        generation, problem = _exportable(found, tokenizer)
        try:
            for part in (config, generation, tokenizer):
                part.save_pretrained(folder)
        except Exception as error:  # whatever a library may raise, now or after hours
            raise UserError(f"{setting}: an export of {path} could not be written: {first_line(error)}") from error
    return problem


def _set_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = eos_ids(tokenizer)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, ids[0] if len(ids) == 1 else list(ids)


def _exportable(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[GenerationConfig, str]:
    """Returns what can be written of a generation configuration, and why the rest can't."""
    from transformers import GenerationConfig

    problem = ""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        lines = str(error).strip().splitlines()
        problem = next((line[2:] for line in lines if line.startswith("- ")), lines[0])
        generation = GenerationConfig(bos_token_id=generation.bos_token_id)
    _set_tokens(generation, tokenizer)
    generation._from_model_config = False  # these ids are meant
    return generation, problem
