"""Bases whose matrices are stored in 4 or 8 bits, by bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlhf.errors import UserError
from rlhf.models.library_calls import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Quantization = Literal["nf4", "int8"]
SETTING = "model.quantization"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import, also by peft, it advises to download kernels
TOLERANCE = 0.15  # relative error of a product: 0.01 in 8 bits, 0.09 in 4 bits, 0.2 with the scales of other blocks


def check_base_storage(config: PreTrainedConfig, what: str, adapted: bool, quantization: Quantization | None) -> None:
    """Refuses to train whole weights that are stored quantised, or to quantise them once more.

    Args:
        config: of a model as it is stored.
        what: names the model for the user.
        adapted: whether only adapters are trained on it.
    """
    if (stored := getattr(config, "quantization_config", None)) is None:
        return
    method = stored.get("quant_method", "") if isinstance(stored, dict) else stored.quant_method
    if not adapted:
        raise UserError(
            f"{what} is stored quantised ({method}), so that its weights cannot be trained: set model.lora to train "
            "adapters on them, or take it in full precision."
        )
    if quantization is not None:
        raise UserError(
            f"{SETTING} is {quantization}, but {what} is stored quantised ({method}) already: leave it out."
        )


def check_quantization(quantization: Quantization | None, adapted: bool) -> None:
    """Refuses a quantised base whose weights would be trained, and one without the package that reads it."""
    if quantization is None:
        return
    if not adapted:
        raise UserError(f"{SETTING} is {quantization}, but rounded weights cannot be trained: set model.lora, too.")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{SETTING} {quantization} needs bitsandbytes: pip install bitsandbytes.")


def check_kernels(skeleton: nn.Module, quantization: Quantization, compute: torch.dtype, device: torch.device) -> None:
    """Refuses a device on which bitsandbytes cannot multiply with matrices like those of a model, or does it wrongly.

    Args:
        skeleton: the model, without weights.
    """
    widths = {getattr(m, "in_features", getattr(m, "nx", 0)) for m in skeleton.modules()} - {0}
    random = torch.Generator().manual_seed(0)
    for width in sorted(widths):
        x, weight = (torch.randn(64, width, generator=random, device="cpu") for _ in range(2))
        try:
            found = _product(quantization, x.to(device, compute), weight.to(device)).cpu().float()
        except Exception as error:  # whatever a device may lack
            why = first_line(error) or type(error).__name__
            raise UserError(
                f"{SETTING} {quantization}: bitsandbytes does not work on {device.type}: {why.rstrip('.')}; leave the "
                "setting out, or take another --trainer.accelerator."
            ) from error
        expected = x @ weight.T
        if not (found - expected).norm() < TOLERANCE * expected.norm():
            raise UserError(
                f"{SETTING} {quantization}: on {device.type}, bitsandbytes computes wrong products with matrices of "
                f"{width} columns, as this model has; take "
                f"{'int8, ' if quantization == 'nf4' else ''}another --trainer.accelerator, or leave the setting out."
            )


def _product(quantization: Quantization, x: Tensor, weight: Tensor) -> Tensor:
    """Computes x W^T with a matrix that is quantised for it."""
    import bitsandbytes as bnb

    if quantization == "int8":
        rounded, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return _EightBitProduct.apply(x, rounded, scale)
    packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return bnb.matmul_4bit(x, packed, state)


def loading_options(quantization: Quantization, device: torch.device) -> dict[str, Any]:
    """Returns what transformers needs to quantise a base while it loads it onto a device.

    Output layer, head and embeddings stay as they are.
    """
    from transformers import BitsAndBytesConfig

    four = quantization == "nf4"
    config = BitsAndBytesConfig(
        load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: PreTrainedModel) -> None:
    """Makes the layers of bitsandbytes compute as others do: in the precision of autocast or of their input.

    Its own in 8 bits would round activations, too, but for columns that depend on all rows of a batch, and in training
    otherwise than in evaluation, as some CPUs would in 4 bits.
    """
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layer: Any
    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear8bitLt):
            layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
        if isinstance(layer, Linear8bitLt):
            # The weight again, whose memory it would keep where that is moved.
            layer.weight.CB = None  # type: ignore[attr-defined]


def in_full(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Makes a quantised model one of plain matrices, those that it computes with, which can be saved."""
    plain = model.dequantize(dtype)
    kept = [x for x in model._weight_conversions or () if not _of_quantizer(x)]
    plain._weight_conversions = kept or None  # transformers would reverse those at a save
    return plain


def _of_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def beside_weights(model: nn.Module) -> list[Any]:
    """Lists what quantised layers hold beside their parameters."""
    return [vars(layer)["quant_state"] for layer in model.modules() if "quant_state" in vars(layer)]


class _EightBitProduct(torch.autograd.Function):
    """x W^T with a matrix in 8 bits, which is made whole in both passes rather than kept between them."""

    @override
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _whole(weight, scale, x.dtype))

    @override
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        return gradient @ _whole(weight, scale, gradient.dtype), None, None


def _whole(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale.to(weight.device).unsqueeze(1) / 127)


def _forward(layer: Any, x: Tensor) -> Tensor:
    import bitsandbytes as bnb

    device, weight = x.device.type, layer.weight
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, bias = x.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.matmul_4bit(x, weight, bias=bias, quant_state=weight.quant_state)
    product: Tensor = _EightBitProduct.apply(x, weight, weight.SCB)
    return product if bias is None else product + bias
