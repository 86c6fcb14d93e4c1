"""What the stages share: tokenizer, optimizer, schedule, ranks, evaluation, export."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from typing_extensions import override

from rlhf.callbacks import unless_given
from rlhf.callbacks.checkpoint_io import check_savable
from rlhf.callbacks.curves import Curves
from rlhf.callbacks.dropout import DisableDropout
from rlhf.callbacks.invariants import Invariants
from rlhf.callbacks.learning import Learning
from rlhf.errors import UserError
from rlhf.hardware import accumulator_dtype, bound_primitive_cache, keep_freed_memory
from rlhf.models.adapter_files import base_of
from rlhf.models.adapters import LoRA, check_lora
from rlhf.models.finite import check_finite
from rlhf.models.frozen import FrozenModel
from rlhf.models.loading import load_config
from rlhf.models.networks import AdaptedNetworks, Networks
from rlhf.models.quantization import Quantization, check_base_storage, check_quantization
from rlhf.models.saving import rehearse_export
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.models.translated import TranslatedModel
from rlhf.models.weights import first_not_finite
from rlhf.modules.epoch_means import EpochMeans
from rlhf.modules.settings import Optimization
from rlhf.seeding import shared_seed
from rlhf.strategies import check_strategy, engine_dtype

EPOCH_MEANS = "epoch_means"  # their key in a checkpoint


def _breaks_alignment(parameter: Tensor) -> bool:
    """Tells whether what follows a parameter in DeepSpeed's flat buffer cannot be read 16 bytes at a time.

    That is the slow path of matrix products on a GPU. The bias of a scalar model, one number, comes first in it.
    """
    return parameter.numel() % 8 > 0


class StageModule(LightningModule):
    """Base of `SFTModule`, `RewardModule`, `DPOModule` and `PPOModule`.

    Args:
        model_path: folder of a Hugging Face model (for example an export of an earlier stage), or a hub name.
        optimization: learning rate, schedule, loss reduction.
        pad_token, eos_tokens: see `rlhf.models.tokenizers.load_tokenizer`.
        activation_checkpointing: keep only the inputs of layers and compute the rest again in the backward pass: a
            third more computation for far less memory.
        lora: train adapters, and leave all other weights as they are; null: train all weights. With it a `model_path`
            may be the folder of an adapter, which is trained further; without it such an adapter is merged first.
        quantization: store the matrices of a base that adapters are trained on in 4 bits (`nf4`) or 8 (`int8`).
    """

    kind: Literal["sft", "reward", "dpo", "ppo"]
    schedule_interval: Literal["step", "epoch"] = "step"

    def __init__(
        self,
        model_path: str,
        optimization: Optimization,
        pad_token: str | None,
        activation_checkpointing: bool,
        eos_tokens: list[str] | None = None,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        check_quantization(quantization, lora is not None)
        self.lora, self.quantization = lora, quantization
        self.model_path = model_path
        self.optimization = optimization
        self.activation_checkpointing = activation_checkpointing
        self.eos_tokens = eos_tokens
        self.tokenizer = load_tokenizer(model_path, pad_token, eos_tokens=eos_tokens)
        self.model_config = load_config(model_path, "model.model_path")
        rehearse_export(model_path, self.tokenizer)
        if lora is not None or base_of(model_path, "model.model_path") == model_path:
            check_base_storage(self.model_config, f"model.model_path: {model_path}", lora is not None, quantization)
        if lora is not None:
            check_lora(lora, model_path, self.model_config, "model.model_path")
        self.epoch_means = EpochMeans()

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        if self.lora is not None and isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.trainer.strategy.exclude_frozen_parameters = True
        if stage == "fit":
            self.check_schedule(self.trainer)
        t = self.trainer
        for loop in (t.fit_loop.epoch_loop.val_loop, t.validate_loop, t.test_loop, t.predict_loop):
            loop.inference_mode = False  # in which autocast would cast every weight again at each step of sampling
        self.check_data(getattr(self.trainer, "datamodule", None))
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
            bound_primitive_cache()

    def check_data(self, data: Any) -> None:
        """Refuses a DataModule that is made for another stage."""
        if (kinds := getattr(data, "kinds", ())) and self.kind not in kinds:
            raise UserError(
                f"data: {type(data).__name__} is for {' and '.join(kinds)}, and {type(self).__name__} is for "
                f"{self.kind}; set --data to the DataModule of the same stage."
            )

    @abstractmethod
    def evaluate(self, batch: Any, batch_idx: int, split: str) -> dict[str, list[dict[str, Any]]]:
        """Logs the metrics of a batch of validation or test as `<split>/<name>`, and returns rows for callbacks."""

    @abstractmethod
    def save_export(self, folder: Path) -> None:
        """Writes what the next stage needs into `folder`. Called on rank 0 only."""

    @property
    def embedding_rows(self) -> int:
        """How many token ids the model has a row for."""
        return int(self.model_config.get_text_config().vocab_size)

    def prepare_export(self) -> None:
        """Does what all ranks must do before an export."""

    @property
    def response_room(self) -> int:
        """How many tokens this stage may sample after a query."""
        return 0

    @property
    def frozen_models(self) -> list[FrozenModel[Any]]:
        """Models that are only read."""
        return []

    def row_losses(self, batch: Any) -> Tensor | None:
        """Computes the loss of each row of a training batch that counts, `(n,)`, if rows have one."""
        return None

    def padding_side_difference(self, batch: Any) -> Tensor | None:
        """Measures how much the rewards of a training batch depend on the side of the padding, if there are any."""
        return None

    def demonstration_rewards(self) -> Tensor | None:
        """Computes this rank's rewards of some demonstrations, whose mean should be 0, if there are any."""
        return None

    @torch.no_grad()
    def score_batches(
        self, model: ScalarModel | TranslatedModel, batches: Iterable[dict[str, Tensor]], limit: int | None = None
    ) -> Tensor:
        """Computes the rewards of batches of whole sequences, `(n,)`, until there are `limit` of them."""
        scores: list[Tensor] = []
        with self.autocast():
            for batch in batches:
                scores.append(model.score(batch["input_ids"].to(self.device), batch["attention_mask"]))
                if limit is not None and sum(map(len, scores)) >= limit:
                    break
        return check_finite(torch.cat(scores), "rewards of demonstrations").to(accumulator_dtype(self.device))

    @cached_property
    def networks(self) -> Networks:
        """Makes the networks of the stage from their folders."""
        where = self.weights_dtype, self.weights_device, self.seed
        if self.lora is None:
            return Networks(*where)
        half = None if self._trainer is None else self.half_precision
        return AdaptedNetworks(*where, self.lora, half, self.quantization)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The precision in which trained weights are loaded; float32 if there is no Trainer yet."""
        return torch.float32 if self._trainer is None else engine_dtype(self._trainer)

    @property
    def weights_device(self) -> torch.device:
        """The device that weights are moved to at once, so that no process holds all its models in CPU memory."""
        return torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device

    def reduce_sum(self, x: Tensor) -> Tensor:
        """Sums a tensor over all ranks."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def reduce_max(self, x: Tensor) -> Tensor:
        """Takes the maximum of a tensor over all ranks, element by element."""
        return self._reduce(x, dist.ReduceOp.MAX)

    @staticmethod
    def _reduce(x: Tensor, operation: Any) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            x = x.clone()
            dist.all_reduce(x, operation)
        return x

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the precision context of `training_step`, for forwards without gradients (rollouts).

        The same numbers as in training, but a weight is cast once in the outermost context, not in every forward.
        """
        plugin: Any = self.trainer.precision_plugin
        half = self.half_precision
        if half is None:
            return plugin.forward_context()
        return torch.autocast(plugin.device, half, cache_enabled=True)  # in validation Lightning's has no cache

    @property
    def half_precision(self) -> torch.dtype | None:
        """The precision to which the Trainer's autocast casts, if there is autocast."""
        plugin = self.trainer.precision_plugin
        if not isinstance(plugin, MixedPrecision):
            return None
        return torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16

    def normaliser(self, own: Tensor, share: float) -> Tensor | float:
        """Returns what a micro-batch divides its summed loss by (D14).

        Args:
            own: number of real tokens (or pairs) in this micro-batch.
            share: their average number per micro-batch of the global batch, over accumulation and ranks.
        """
        return share if self.optimization.loss_reduction == "minibatch" else own.clamp(min=1)

    @property
    def learning_rate(self) -> float:
        """The current learning rate: the highest of all parameter groups, since one may be held at 0."""
        return max(group["lr"] for group in self.trainer.optimizers[0].param_groups)

    def check_schedule(self, trainer: Trainer) -> None:
        """Refuses a schedule that falls until the end of a training that has none."""
        counted = self.schedule_interval == "step" and trainer.max_steps != -1
        if self.optimization.schedule != "constant" and trainer.max_epochs == -1 and not counted:
            raise UserError(
                f"model.optimization.schedule is {self.optimization.schedule}, which needs a length: set "
                "trainer.max_epochs, or the schedule to constant."
            )

    def total_schedule_steps(self) -> int:
        """Returns how often the learning-rate schedule steps: once per optimizer step, or per PPO update."""
        if self.schedule_interval == "epoch":
            return max(1, self.trainer.max_epochs or 1)
        return int(self.trainer.estimated_stepping_batches)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Lists every trained parameter, in groups that the optimizer can treat apart."""
        return [[p for p in self.parameters() if p.requires_grad]]

    @override
    def configure_optimizers(self) -> Any:
        from transformers import get_scheduler

        o = self.optimization
        optimizer = torch.optim.AdamW(
            [{"params": sorted(group, key=_breaks_alignment)} for group in self.parameter_groups()],
            lr=o.learning_rate,
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=self._fused(),
        )
        name = "constant_with_warmup" if o.schedule == "constant" else o.schedule
        scheduler = get_scheduler(name, optimizer, o.warmup_steps, self.total_schedule_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule_interval}}

    def _fused(self) -> bool:
        """Whether AdamW may be fused: Lightning refuses to clip or unscale the gradients of such an optimizer."""
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return not (mixed and (self.trainer.gradient_clip_val or self.trainer.precision == "16-mixed"))

    def default_callbacks(self) -> list[Callback]:
        """Returns the callbacks of the stage; one of the same class in `trainer.callbacks` replaces its default."""
        return [DisableDropout(), Invariants(), Learning(), Curves()]

    @override
    def configure_callbacks(self) -> list[Callback]:
        return unless_given(self.trainer.callbacks, *self.default_callbacks())  # type: ignore[attr-defined]

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return shared_seed()

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.evaluate(batch, batch_idx, "validation")

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.evaluate(batch, batch_idx, "test")

    @override
    def on_train_epoch_end(self) -> None:
        # Every rank logs the same mean; sync_dist keeps Lightning from warning.
        self.log_dict(self.epoch_means.pop(self.reduce_sum), sync_dist=True)

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns all weights; with adapters those that are trained, as the base is not changed."""
        state = super().state_dict(*args, **kwargs)
        if self.lora is None:
            return state
        known = chain(self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False))
        changed = {name for name, x in known if x.requires_grad or not isinstance(x, nn.Parameter)}
        return {name: x for name, x in state.items() if name in changed}  # nor what describes a quantised weight

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        complete = self.lora is not None and state_dict.keys() >= self.state_dict().keys()
        return super().load_state_dict(state_dict, strict and not complete, assign)

    def check_state(self, state: dict[str, Tensor] | None, name: str) -> None:
        """Refuses the weights of a checkpoint if they are of another model, or not finite.

        Args:
            state: None where they are loaded already, as DeepSpeed does.
            name: of the checkpoint.
        """
        own = self.state_dict()
        state = own if state is None else state
        shapes, others = ({key: tuple(getattr(x, "shape", ())) for key, x in y.items()} for y in (own, state))
        if shapes != others and self.strict_loading:
            unlike = [key for key in own.keys() | state.keys() if shapes.get(key) != others.get(key)]
            first = min(adapters := [key for key in unlike if ".lora_" in key], default=min(unlike))
            raise UserError(
                f"{name} does not fit {type(self).__name__} and its model.{'lora' if adapters else 'model_path'}: "
                f"{first} is {others.get(first, 'missing')} in the checkpoint, and {shapes.get(first, 'missing')} in "
                "the model."
            )
        if broken := first_not_finite(state.items()):
            raise UserError(f"{name} holds weights that are not finite: there is NaN or infinity in {broken}.")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_savable(self.trainer, self)
        checkpoint[EPOCH_MEANS] = self.epoch_means.state()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_state(checkpoint.get("state_dict"), f"ckpt_path: {self.trainer.ckpt_path}")
        if self.trainer.training:
            self.epoch_means.load(checkpoint.get(EPOCH_MEANS, [{}]), self.global_rank, self.trainer.world_size)
