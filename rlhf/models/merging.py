"""Adapters merged into their bases: in an export, and weight by weight."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rlhf.models.adapter_files import ADAPTER_FILE
from rlhf.models.adapters import NAME, is_adapted
from rlhf.models.loading import is_classifier, load_causal_lm, load_config
from rlhf.models.saving import save_pretrained
from rlhf.models.scalar_model import ScalarModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGED = "merged"


def merge_exports(root: Path, export: Literal["adapter", "merged", "both"], tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds whole models to the adapters in an export, or puts them in their place.

    The base is read again, in float32, as that of the training may be quantised or in half precision.
    """
    if export == "adapter":
        return
    for folder in [file.parent for file in root.rglob(ADAPTER_FILE)]:
        path, setting, whole = str(folder), "the export", folder / MERGED
        if is_classifier(load_config(path, setting)):
            ScalarModel.from_pretrained(path, setting).save(whole, tokenizer)
        else:
            save_pretrained(load_causal_lm(path, setting), tokenizer, whole)
        if export == "merged":
            for file in filter(Path.is_file, list(folder.iterdir())):
                file.unlink()
            for file in list(whole.iterdir()):
                shutil.move(file, folder)
            whole.rmdir()


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of a model by their names without adapters, which are merged into them.

    Each is made when it is asked for, so that there is never a second copy of the model. A weight that two modules
    share comes once.
    """
    adapted, seen = is_adapted(model), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in seen or (adapted and (".lora_" in name or ".original_module." in name)):
            continue
        seen.add(parameter)
        weight: Tensor = parameter.detach()
        if adapted and name.endswith(".weight"):
            module = model.get_submodule(name.removesuffix(".base_layer.weight").removesuffix(".weight"))
            weight = _merged(module)
        yield name.replace(".base_layer.", ".").replace(f".modules_to_save.{NAME}.", "."), weight
    if not adapted:
        known = dict(model.named_parameters(remove_duplicate=False))
        yield from ((name, x.detach()) for name, x in model.state_dict().items() if name not in known)


def _merged(layer: Any) -> Tensor:
    """Computes the weight of a layer, in float32 if it has an adapter or is quantised."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    if not isinstance(layer, LoraLayer):
        weight: Tensor = layer.weight.detach()
        return weight if weight.is_floating_point() else dequantize_module_weight(layer).float()
    adapted: Any = layer
    delta: Tensor = adapted.get_delta_weight(NAME)
    merged = dequantize_module_weight(adapted.get_base_layer()).float() + delta.float()
    if not adapted.use_dora.get(NAME):
        return merged
    inputs = 0 if adapted.fan_in_fan_out else 1  # the dimension; the lengths of what is left are trained by DoRA
    lengths: Tensor = adapted.lora_magnitude_vector[NAME].weight.float().unsqueeze(inputs)
    return merged * lengths / merged.norm(dim=inputs, keepdim=True)
