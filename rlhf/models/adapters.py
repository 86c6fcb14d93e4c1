"""Adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): small matrices, trained beside the frozen ones of a base."""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ConfigDict, PositiveInt, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from rlhf.errors import NonNegative, Positive, UserError
from rlhf.models.adapter_files import CLASSIFIER, SCORE, adapter_settings, base_path, is_classifier_adapter
from rlhf.models.library_calls import explained, first_line
from rlhf.models.remote_code import trusts_remote_code
from rlhf.models.target_modules import all_linear, linear_modules, tied_modules
from rlhf.models.weights import first_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "default"  # that peft gives to the only adapter of a model
PREFIX = "base_model.model."  # of the names in the file of an adapter
ALL_LINEAR = "all-linear"
HEAD = f"{SCORE}.weight"  # of a reward model
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # that peft reads
KEEPS_BASE = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}


@dataclass(frozen=True, config=ConfigDict(title="model.lora"))
class LoRA:
    """An adapter: each chosen matrix W becomes W + s B A, where only A and B are trained, and B begins at 0.

    Attributes:
        rank: rows of A and columns of B.
        alpha: s is alpha / rank, or with `rslora` alpha / sqrt(rank).
        target_modules: names of linear modules, as their last parts (`query_key_value`) or whole; `all-linear` takes
            all but the output layer and the head.
        modules_to_save: names of modules that are trained whole, such as `embed_in`; they are no longer shared.
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
        dora: train the lengths of the columns apart from their directions (Liu et al. 2024, arXiv 2402.09353).
        dropout: 0; anything else is refused (D10).
        export: the `adapter` alone, which needs its base; the `merged` whole model, in float32; or `both`, the merged
            one in the folder `merged` of the adapter's.
    """

    rank: PositiveInt = 16
    alpha: Positive = 32.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    rslora: bool = False
    dora: bool = False
    dropout: NonNegative = 0.0
    export: Literal["adapter", "merged", "both"] = "adapter"

    @field_validator("dropout")
    @classmethod
    def _off(cls, dropout: float) -> float:
        if dropout:
            raise UserError(
                f"model.lora.dropout is {dropout}: it should be 0, as with dropout no log-probability could be "
                "computed again (D10)."
            )
        return dropout

    def config(self, base: str, classifier: bool) -> Any:
        """Returns peft's configuration of a new adapter for a base."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            use_rslora=self.rslora,
            use_dora=self.dora,
            base_model_name_or_path=base_path(base),
            task_type=CLASSIFIER if classifier else "CAUSAL_LM",
        )


def add_adapter(model: nn.Module, lora: LoRA, base: str, seed: int, setting: str) -> None:
    """Gives a model a new adapter, in place, that changes nothing yet. All other weights are frozen.

    Args:
        base: where the model comes from.
        seed: of A.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(model, lora.config(base, _is_classifier(model)), f"{setting} {base}")
    _as_base(model)


def load_adapter(model: nn.Module, path: str, setting: str, trained: bool, headless: bool = False) -> Any:
    """Gives a model the adapter of a folder, in place. All other weights are frozen.

    Args:
        model: the base; a reward model may have a language model's adapter.
        trained: whether it is trained further.
        headless: the head of the model is new, so that the adapter of a reward model must bring its own.

    Returns:
        peft's object, which can merge it.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, load_peft_weights

    model.requires_grad_(False)
    folder = os.path.expanduser(path)
    if os.path.isdir(folder) and not any(os.path.isfile(os.path.join(folder, name)) for name in WEIGHTS):
        raise UserError(f"{setting}: the adapter {path} has no weights: there is no {WEIGHTS[0]}.")
    with explained(f"{setting}: the adapter {path} cannot be loaded"):
        config: Any = PeftConfig.from_pretrained(folder)
        weights = load_peft_weights(folder, device="cpu")
    if not isinstance(config, LoraConfig):
        raise UserError(f"{setting}: the adapter {path} is of type {config.peft_type}; only LoRA is known here.")
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    config.lora_dropout, config.inference_mode = 0.0, not trained  # D10
    if _is_classifier(model):
        _set_head(model, weights.pop(HEAD, None), path, setting, headless and is_classifier_adapter(path))
        config.task_type = CLASSIFIER
        config.modules_to_save = [name for name in config.modules_to_save or () if name != SCORE] or None
        if isinstance(config.target_modules, set):  # peft puts a head there that is trained whole, and skips it
            config.target_modules -= {SCORE}
        inside = {name for name, _ in model.named_modules()}
        weights = {name: x for name, x in weights.items() if name.partition(".")[0] in inside}
    tuner = _inject(model, config, f"{setting} {config.base_model_name_or_path}")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(x.shape) for name, x in own.items()}
    found = {name: tuple(x.shape) for name, x in weights.items()}
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise UserError(
            f"{setting}: the adapter {path} does not fit its base {config.base_model_name_or_path}: {name} is "
            f"{found.get(name, 'missing')} in the adapter, and {expected.get(name, 'missing')} in the model."
        )
    if broken := first_not_finite(weights.items()):
        raise UserError(f"{setting}: the adapter {path} is not finite: there is NaN or infinity in {broken}.")
    with torch.no_grad():
        # peft's own function takes the names of some types for older ones, and leaves their weights out.
        for name, weight in weights.items():
            own[name].copy_(weight)
    _as_base(model)
    return tuner


def check_keeps_base(path: str, setting: str) -> None:
    """Refuses an adapter that may change weights of its base, which other networks share."""
    found = adapter_settings(path) or {}
    for name, known in KEEPS_BASE.items():
        if (value := found.get(name, known[0])) not in known:
            raise UserError(
                f"{setting}: the adapter {path} has {name} {value}, which may change weights of its base, and with "
                "model.lora several networks share them; merge it into its base first."
            )


def merge_adapter(model: nn.Module, path: str, setting: str, headless: bool) -> None:
    """Adds the adapter of a folder to the weights of its base, in place, so that the model is a plain one again."""
    load_adapter(model, path, setting, False, headless).merge_and_unload()
    model.requires_grad_(True)
    vars(model).pop("peft_config", None)  # which older versions of peft leave


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes the adapter of a model as peft does, a reward model's with its head."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = copy.copy(model.peft_config[NAME])  # type: ignore[index]
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    if _is_classifier(model):
        weights[HEAD] = model.get_parameter(HEAD)
        config.modules_to_save = [*(config.modules_to_save or ()), SCORE]
    config.save_pretrained(folder)
    tensors = {PREFIX + name: x.detach().to("cpu", torch.float32).contiguous() for name, x in weights.items()}
    save_file(tensors, folder / WEIGHTS[0], metadata={"format": "pt"})


def is_adapted(model: nn.Module) -> bool:
    """Tells whether a model has an adapter."""
    return hasattr(model, "peft_config")


def check_lora(lora: LoRA, path: str, config: "PreTrainedConfig", setting: str) -> None:
    """Refuses an adapter that a model has no place for, or other settings than those of one that is trained further.

    Nothing is loaded.
    """
    found = adapter_settings(path)
    if found is None:
        model = without_weights(config)
        everything = {own for own, _ in model.named_modules()}
        for name, names in (("target_modules", linear_modules(model)), ("modules_to_save", everything)):
            wanted = getattr(lora, name)
            for missing in _not_among(names, [] if wanted in (None, ALL_LINEAR) else wanted):
                known = sorted({own.rpartition(".")[2] for own in names if not own[-1:].isdecimal()} - {""})
                raise UserError(f"model.lora.{name}: {setting} {path} has no {missing}; it has {', '.join(known)}.")
        _inject(model, lora.config(path, False), f"{setting} {path}")
        return
    check_keeps_base(path, setting)
    own_values: dict[str, Any] = {
        "rank": found.get("r"),
        "alpha": found.get("lora_alpha"),
        "rslora": found.get("use_rslora", False),
        "dora": found.get("use_dora", False),
        "target_modules": _last_parts(found.get("target_modules")),
        "modules_to_save": sorted({*_last_parts(found.get("modules_to_save"))} - {HEAD.partition(".")[0]}),
    }
    for name, value in own_values.items():
        own = getattr(lora, name)
        if own != ALL_LINEAR and (own if name in ("rank", "alpha", "rslora", "dora") else _last_parts(own)) != value:
            raise UserError(
                f"model.lora.{name} is {own}, and the adapter {path} that {setting} trains further has {value}; set it "
                "to that, or start from a merged model (export --model.lora.export merged)."
            )


def _last_parts(names: str | list[str] | None) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in ([names] if isinstance(names, str) else names or ())})


def _is_classifier(model: nn.Module) -> bool:
    return isinstance(getattr(model, "score", None), nn.Linear)


def _not_among(names: set[str], wanted: list[str]) -> list[str]:
    """Returns those of the wanted modules that are not there, by their whole names or the last parts of them."""
    return [name for name in wanted if not any(own == name or own.endswith(f".{name}") for own in names)]


def without_weights(config: "PreTrainedConfig") -> nn.Module:
    """Makes the modules of a language model, without memory for their weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_remote_code())


def train_adapter_only(model: nn.Module, lora: LoRA) -> None:
    """Gives a model without weights, on the device `meta`, an adapter, so that its parameters can be counted."""
    model.requires_grad_(False)
    with torch.device("meta"):
        _inject(model, lora.config("", _is_classifier(model)), "the model")
    if _is_classifier(model):
        model.get_parameter(HEAD).requires_grad_(True)


def _inject(model: nn.Module, config: Any, what: str) -> Any:
    """Puts an adapter into a model, in place; `what` names the model for the user."""
    from peft import LoraModel

    if config.target_modules == ALL_LINEAR:
        config.target_modules = all_linear(model, config)
    for name, parameter in model.named_parameters():
        whole = next((x for x in config.modules_to_save or () if f".{x}." in f".{name}"), None)
        if whole is not None and not parameter.is_floating_point():
            raise UserError(f"model.lora.modules_to_save: {whole} of {what} is quantised and cannot be trained whole.")
    tied = tied_modules(model)
    try:
        tuner = LoraModel(model, config, NAME)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"model.lora does not fit {what}: {first_line(error)}") from error
    for name in sorted(tied):
        if hasattr(model.get_submodule(name), "lora_A"):
            raise UserError(
                f"model.lora does not fit {what}: the matrix of {name} is that of another module, too, so an adapter "
                "of it could not be merged; leave it out of target_modules."
            )
    return tuner


def _set_head(model: nn.Module, head: Tensor | None, path: str, setting: str, needed: bool) -> None:
    if head is not None:
        with torch.no_grad():
            model.get_parameter(HEAD).copy_(head)
    elif needed:
        raise UserError(f"{setting}: the adapter {path} is of a reward model, but has no head ({HEAD}).")


def _as_base(model: nn.Module) -> None:
    """Gives adapters the precision of the base: DeepSpeed casts those that it trains, and a frozen one must agree."""
    dtype = getattr(model, "dtype", torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.to(dtype)
