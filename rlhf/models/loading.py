"""Causal language models from a local folder or the hub, and checks of them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from rlhf import files
from rlhf.errors import UserError
from rlhf.hardware import avoid_plans_of_attention
from rlhf.models.probes import is_causal
from rlhf.models.remote_code import trusts_remote_code
from rlhf.models.weights import check_weights

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

SHIFT = "reward_shift"  # in the configuration of a reward model: what is subtracted from the scores of transformers


def check_model_path(path: str, setting: str, *others: str) -> None:
    """Refuses a path that is neither a folder with a `config.json` nor shaped like a name on the hub.

    `setting` is the user's name for this path, here and below. One of the files `others` will do, too.
    """
    folder = os.path.expanduser(path)
    if path and os.path.isdir(folder):  # unlike pathlib's, it raises nothing
        if not any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", *others)):
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
    """Loads the configuration of a model."""
    from transformers import AutoConfig

    check_model_path(path, setting)
    with explained(f"{setting}: {path} is not a model that can be loaded"):
        return AutoConfig.from_pretrained(os.path.expanduser(path), trust_remote_code=trusts_remote_code())


@contextmanager
def explained(sentence: str) -> Iterator[None]:
    """Turns whatever a library raises, in the block, at files that others wrote into one sentence.

    Python code among them is refused, unless the user trusts it: transformers would ask on the terminal.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = first_line(error) or type(error).__name__
        if "trust_remote_code=True" in str(error):
            why = "it needs Python code that comes with it; read that code, and add --trust_remote_code to run it."
        elif isinstance(error, UnpicklingError):
            unsafe = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it would run {unsafe[1]}, so it is not read." if unsafe else "it is broken, or holds no weights."
        elif isinstance(error, SafetensorError):
            why = f"a file of its weights is broken, or cut off: {why}"
        elif isinstance(error, JSONDecodeError):
            why = f"a JSON file of it is broken: {why}"
        elif not isinstance(error, OSError | ValueError | RuntimeError):  # the message is not meant for users
            why = f"a file of it is not of the expected form ({type(error).__name__}: {why})"
        raise UserError(f"{sentence}: {why.rstrip('.')}.") from error


def load_generation_config(path: str, config: PreTrainedConfig) -> tuple[GenerationConfig, bool]:
    """Loads the generation configuration of a model, and tells whether it is the model's own.

    Otherwise there is none, or one that transformers made from `config`.
    """
    from transformers import GenerationConfig

    with quiet():
        try:
            found = GenerationConfig.from_pretrained(os.path.expanduser(path))
        except Exception as error:
            file = Path(path).expanduser() / "generation_config.json"
            if file.is_file():  # it may name EOS tokens
                raise UserError(f"{file} cannot be read: {first_line(error)}; mend it, or delete it.") from error
            found = GenerationConfig.from_model_config(config)
    return found, not found._from_model_config or isinstance(found.eos_token_id, list)


def is_classifier(config: PreTrainedConfig) -> bool:
    """Tells whether a model is a reward model or critic."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


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
    """Computes a fingerprint of a model folder from its contents, wherever it is; for a hub name, `name@commit`."""
    config = load_config(path, setting)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    kinds, names = (".safetensors", ".bin", ".py"), ("config.json", files.MANIFEST)
    return files.sampled_fingerprint(sorted(f for f in folder.iterdir() if f.suffix in kinds or f.name in names))


def load_causal_lm(path: str, setting: str = "model.model_path", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode. `dtype` replaces that of the stored weights."""
    return from_pretrained("AutoModelForCausalLM", path, check_language_model(path, setting), setting, dtype)


def from_pretrained(
    kind: str, path: str, config: PreTrainedConfig, setting: str, dtype: torch.dtype, new: str | None = None
) -> PreTrainedModel:
    """Loads a model by the name of its `Auto...` class, with all its weights but a `new` one.

    transformers would initialise other weights that are missing, too.
    """
    import transformers

    check_export(path, setting)
    avoid_plans_of_attention()
    auto_class = getattr(transformers, kind)
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0  # RWKV halves weights in place in evaluation, as float16 needs it
    cannot = f"{setting}: the model {path} cannot be loaded"
    with explained(cannot), quiet(), torch.device("cpu"):  # in Lightning's, transformers would ask for accelerate
        model, report = auto_class.from_pretrained(
            os.path.expanduser(path),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
            trust_remote_code=trusts_remote_code(),
        )
    with explained(cannot):
        check_weights(model, report, path, setting, new)
    try:
        causal = is_causal(model)
    except FloatingPointError as error:
        raise UserError(
            f"{setting}: {path} computes NaN or infinity from finite weights: look at the numbers in its config.json."
        ) from error
    except Exception as error:  # whatever a model may do that does not take token ids alone
        if not torch.cuda.is_available():
            raise UserError(f"{setting}: {path} cannot read a row of token ids: {first_line(error)}") from error
        causal = True  # not tested: kernels may need the GPU that the model is moved to later
    if not causal:
        raise UserError(
            f"{setting}: {path} is no causal language model: in {type(model).__name__} a token depends on later ones."
        )
    return model


def check_export(path: str, setting: str) -> None:
    """Refuses weights of an export that are not those that were written; any other model says nothing of its sums."""
    folder = Path(path).expanduser().resolve()
    root = next((place for place in (folder, folder.parent) if files.is_complete(place)), None)  # a critic's is above
    if root is None or not files.is_main_process():
        return
    try:
        written = json.loads((root / files.MANIFEST).read_text()).get(files.CHECKSUMS, {})
        stats = [(str(file), file.stat()) for file in sorted(folder.rglob(files.WEIGHTS))]
        found = _checksums(folder, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {root} cannot be read: {error}") from error
    for name, checksum in found.items():
        if written.get(str((folder / name).relative_to(root)), checksum) != checksum:
            raise UserError(
                f"{setting}: {folder / name} is damaged: its contents are not those that were written. Export it "
                f"again; if it was changed on purpose, delete {files.CHECKSUMS} from {root / files.MANIFEST}."
            )


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


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the progress bars and warnings of transformers, among them reports of heads that are meant to be new."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, and the next one if that says what it is."""
    first, *others = str(error).strip().split("\n")
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
