"""Causal language models from a local folder or the hub, and checks of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from rlhf import files
from rlhf.errors import UserError
from rlhf.hardware import avoid_plans_of_attention
from rlhf.models.adapter_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    adapter_settings,
    base_of,
    holder,
    is_classifier_adapter,
)
from rlhf.models.adapters import merge_adapter
from rlhf.models.library_calls import explained, first_line, quiet
from rlhf.models.probes import is_causal
from rlhf.models.quantization import in_full, settle
from rlhf.models.remote_code import trusts_remote_code
from rlhf.models.weights import check_weights

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

CLASSIFIER_SUFFIX = "ForSequenceClassification"  # of the classes of reward models
BASES = "bases"  # in the manifest of an export: fingerprints of the bases of its adapters
NONE: Mapping[str, Any] = MappingProxyType({})
SHIFT = "reward_shift"  # in the configuration of a reward model: what is subtracted from the scores of transformers


def check_model_path(path: str, setting: str, *others: str) -> None:
    """Refuses a path that is neither a folder with a `config.json` nor shaped like a name on the hub.

    `setting` is the user's name for this path, here and below. One of the files `others` will do, too.
    """
    folder = os.path.expanduser(path)
    if path and os.path.isdir(folder):  # unlike pathlib's, it raises nothing
        if not any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", ADAPTER_FILE, *others)):
            raise UserError(
                f"{setting}: the folder {path} has no config.json that can be read, so it is not a Hugging Face model."
            )
        return
    looks_local = os.path.isabs(folder) or path.startswith((".", "~")) or path.count("/") != 1
    if looks_local or os.path.isdir(os.path.dirname(folder)) or os.path.exists(folder):
        raise UserError(
            f"{setting}: there is no model folder {path or '(it is empty)'}; give the folder of an export, or a hub "
            "name (owner/name)."
        )


def load_config(path: str, setting: str) -> PreTrainedConfig:
    """Loads the configuration of a model, or of the base of an adapter, then with what the adapter makes of it."""
    from transformers import AutoConfig

    check_model_path(path, setting)
    place = holder(path, setting, "config.json")
    own = Path(path).expanduser() / CONFIG_FILE
    if place != path and own.is_file():
        place = path = str(own)
    with explained(f"{setting}: {path} is not a model that can be loaded"):
        config = AutoConfig.from_pretrained(os.path.expanduser(place), trust_remote_code=trusts_remote_code())
    if place != path and is_classifier_adapter(path) and not is_classifier(config):
        config.num_labels, config.architectures = 1, [f"Adapted{CLASSIFIER_SUFFIX}"]
    return config


def load_generation_config(path: str, config: PreTrainedConfig) -> tuple[GenerationConfig, bool]:
    """Loads the generation configuration of a model, and tells whether it is the model's own.

    Otherwise there is none, or one that transformers made from `config`.
    """
    from transformers import GenerationConfig

    place = holder(path, "model", "generation_config.json")
    with quiet():
        try:
            found = GenerationConfig.from_pretrained(os.path.expanduser(place))
        except Exception as error:
            file = Path(place).expanduser() / "generation_config.json"
            if file.is_file():  # it may name EOS tokens
                raise UserError(f"{file} cannot be read: {first_line(error)}; mend it, or delete it.") from error
            found = GenerationConfig.from_model_config(config)
    return found, not found._from_model_config or isinstance(found.eos_token_id, list)


def is_classifier(config: PreTrainedConfig) -> bool:
    """Tells whether a model is a reward model or critic."""
    return any(name.endswith(CLASSIFIER_SUFFIX) for name in config.architectures or ())


def check_language_model(path: str, setting: str) -> PreTrainedConfig:
    """Returns the configuration of a language model, and refuses a reward model: its output layer would be random."""
    from transformers import AutoModelForCausalLM

    config = load_config(path, setting)
    if is_classifier(config):
        raise UserError(f"{setting}: {path} holds a reward model, not a causal language model.")
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and trusts_remote_code()
    if type(config) not in AutoModelForCausalLM._model_mapping and not own_code:
        raise UserError(f"{setting}: {path} is of type {config.model_type}, which is no causal language model.")
    return config


def check_reward_model(path: str, setting: str) -> PreTrainedConfig:
    """Returns the configuration of a reward model, and refuses any other model: its head would be random."""
    config = load_config(path, setting)
    if not is_classifier(config) or config.num_labels != 1:
        if (adapter_settings(path) or {"task_type": ""}).get("task_type") is None:
            raise UserError(
                f"{setting}: the adapter {path} has no head, so its rewards are lost; train it again with "
                'modules_to_save=["score"] or task_type="SEQ_CLS" in its LoraConfig.'
            )
        names = ", ".join(config.architectures or ["no model"])
        raise UserError(
            f"{setting}: {path} holds {names}, not a reward model with one label; give the export folder of the reward "
            "stage."
        )
    shift = getattr(config, SHIFT, 0.0)
    if not isinstance(shift, int | float) or not math.isfinite(shift):
        raise UserError(f"{setting}: {SHIFT} in the config.json of {path} is {shift!r}, not a number.")
    return config


def check_context(config: PreTrainedConfig, longest: int, what: str, advice: str) -> None:
    """Refuses sequences longer than the context of a model; `what` names the longest one, `advice` ends the message."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < longest:  # XLNet says -1: any number
        raise UserError(f"{what} has {longest} tokens, more than the {positions} positions of the model; {advice}.")


def model_fingerprint(path: str, setting: str) -> str:
    """Computes a fingerprint of a model folder from its contents, wherever it is; for a hub name, `name@commit`.

    That of an adapter has that of its base in it.
    """
    config, base = load_config(path, setting), base_of(path, setting)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    kinds, names = (".safetensors", ".bin", ".py"), ("config.json", files.MANIFEST)
    own = files.sampled_fingerprint(sorted(f for f in folder.iterdir() if f.suffix in kinds or f.name in names))
    return own if base == path else files.fingerprint([own, model_fingerprint(base, setting)])


def fingerprints_of_bases(export: Path) -> dict[str, str]:
    """Computes a fingerprint of the base of each adapter in an export, by the adapter's folder."""
    found = {
        file.parent.relative_to(export): base_of(str(file.parent), "the export") for file in export.rglob(ADAPTER_FILE)
    }
    return {str(folder): model_fingerprint(base, "the export") for folder, base in found.items()}


def check_base(path: str, setting: str) -> str:
    """Returns the base of an adapter, and refuses one that has changed since the adapter was exported."""
    base = base_of(path, setting)
    found = _export_of(Path(path)) if base != path else None
    if found is not None and files.is_main_process():
        root, folder = found
        known = _manifest(root).get(BASES, {}).get(str(folder.relative_to(root)))
        if known is not None and known != model_fingerprint(base, setting):
            raise UserError(
                f"{setting}: the base {base} of the adapter {path} has changed since the adapter was trained on it; "
                "bring back the old one, or train the adapter again."
            )
    return base


def load_causal_lm(
    path: str,
    setting: str = "model.model_path",
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] = NONE,
) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode. `dtype` replaces that of the stored weights."""
    config = check_language_model(path, setting)
    return from_pretrained("AutoModelForCausalLM", path, config, setting, dtype, options=options)


def from_pretrained(
    kind: str,
    path: str,
    config: PreTrainedConfig,
    setting: str,
    dtype: torch.dtype,
    new: str | None = None,
    options: Mapping[str, Any] = NONE,
) -> PreTrainedModel:
    """Loads a model by the name of its `Auto...` class, with all its weights but a `new` one, an adapter merged.

    transformers would initialise other weights that are missing, too; it takes further `options`.
    """
    import transformers

    check_export(path, setting)
    base = check_base(path, setting)
    avoid_plans_of_attention()
    auto_class = getattr(transformers, kind)
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0  # RWKV halves weights in place in evaluation, as float16 needs it
    cannot = f"{setting}: the model {path} cannot be loaded"
    with explained(cannot), quiet(), torch.device("cpu"):  # in Lightning's, transformers would ask for accelerate
        model, report = auto_class.from_pretrained(
            os.path.expanduser(base),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
            trust_remote_code=trusts_remote_code(),
            **options,
        )
    settle(model)
    quantized = bool(getattr(model, "is_quantized", False))
    if "quantization_config" in options:  # it says how weights are stored; these are not
        del model.config.quantization_config
    with explained(cannot):
        check_weights(model, report, base, setting, new)
    try:
        causal = is_causal(model)
    except FloatingPointError as error:
        raise UserError(
            f"{setting}: {path} computes NaN or infinity{'' if quantized else ' from finite weights'}: look at the "
            f"numbers in its {'weights and its ' if quantized else ''}config.json."
        ) from error
    except Exception as error:  # whatever a model may do that does not take token ids alone
        if quantized or not torch.cuda.is_available():
            how = ", quantised, cannot" if quantized else " cannot"
            raise UserError(f"{setting}: {path}{how} read a row of token ids: {first_line(error)}") from error
        causal = True  # not tested: kernels may need the GPU that the model is moved to later
    if not causal:
        raise UserError(
            f"{setting}: {path} is no causal language model: in {type(model).__name__} a token depends on later ones."
        )
    if base != path:
        if quantized:
            model = in_full(model, dtype)
        merge_adapter(model, path, setting, headless=new is not None)
    return model


def check_export(path: str, setting: str) -> None:
    """Refuses weights of an export that are not those that were written; any other model says nothing of its sums."""
    found = _export_of(Path(path))
    if found is None or not files.is_main_process():
        return
    root, folder = found
    try:
        written = _manifest(root).get(files.CHECKSUMS, {})
        stats = [(str(file), file.stat()) for file in sorted(folder.rglob(files.WEIGHTS))]
        sums = _checksums(folder, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {root} cannot be read: {error}") from error
    for name, checksum in sums.items():
        if written.get(str((folder / name).relative_to(root)), checksum) != checksum:
            raise UserError(
                f"{setting}: {folder / name} is damaged: its contents are not those that were written. Export it "
                f"again; if it was changed on purpose, delete {files.CHECKSUMS} from {root / files.MANIFEST}."
            )


def _export_of(path: Path) -> tuple[Path, Path] | None:
    """Returns the folder of the export that a model is in, which for a critic is the one above, and the model's."""
    folder = path.expanduser().resolve()
    root = next((place for place in (folder, folder.parent) if files.is_complete(place)), None)
    return None if root is None else (root, folder)


def _manifest(root: Path) -> dict[str, Any]:
    return json.loads((root / files.MANIFEST).read_text())


@cache
def _checksums(folder: Path, *_: tuple[str, int, int]) -> dict[str, str]:
    """Computes the sums of the weights in a folder once, as long as these names, sizes and times stay the same."""
    return files.checksums(folder, files.WEIGHTS)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes a model keep only the input of every layer, and compute the rest again in the backward pass.

    transformers does so in training mode, which differs from evaluation mode in nothing else once dropout is off.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"model.activation_checkpointing: {type(model).__name__} cannot compute activations again; set it to false."
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
