"""DeepSpeed ZeRO stage 2 with the same numbers as a single process."""

import os
import pkgutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from typing_extensions import override

from rlhf import heartbeat
from rlhf.errors import MissingProcessError, UserError
from rlhf.models.library_calls import explained

NAME = "zero2"
LONGEST_COLLECTIVE = timedelta(days=1)  # others may read or write meanwhile; the heartbeat knows who is missing
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch looks at this variable of the environment at every read
HARMLESS = (  # what DeepSpeed puts into its files besides tensors
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


@contextmanager
def safe_reading() -> Iterator[None]:
    """Makes torch read only what cannot run code, in the block, also where DeepSpeed asks it not to be so strict.

    Needs DeepSpeed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    allowed = [pkgutil.resolve_name(name) for name in HARMLESS]
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        del os.environ[FORCE]
        if before is not None:
            os.environ[FORCE] = before


def pickle_stages_by_value() -> None:
    """Makes files of ZeRO readable by `safe_reading`: Python 3.11.0 to 3.11.3 writes a call of getattr for an enum."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))


class Zero2Strategy(DeepSpeedStrategy):
    """ZeRO stage 2: gradients and optimizer states are partitioned across processes, weights are whole on each.

    `--trainer.strategy zero2`, or `Trainer(strategy="zero2")` once this module is imported. Lightning's own
    `deepspeed_stage_2` divides the loss by the accumulation twice, which Adam hides and clipping does not, and adds up
    gradients in 16 bit. This one also runs on CPUs, so that it can be tested.

    Args:
        grad_accum_dtype: precision in which the gradients of micro-batches are added up.
        **kwargs: those of `lightning.pytorch.strategies.DeepSpeedStrategy`.
    """

    strategy_name = NAME

    def __init__(self, grad_accum_dtype: Literal["fp32", "bf16", "fp16"] = "fp32", **kwargs: Any) -> None:
        if find_spec("deepspeed") is None:
            needed = "needs DeepSpeed, which is not installed here: pip install deepspeed (on Linux), or use ddp."
            raise UserError(f"trainer.strategy {NAME} {needed}")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        super().__init__(stage=2, **kwargs)
        assert self.config is not None
        stage = self.config.get("zero_optimization", {}).get("stage")
        if stage != 2:
            raise UserError(f"trainer.strategy {NAME} is ZeRO stage 2, but its DeepSpeed config has stage {stage}.")
        self.config.setdefault("data_types", {"grad_accum_dtype": grad_accum_dtype})
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # or Lightning asks for the loader, too early
        # The optimizer is the module's own, with its states on the device or offloaded.
        self.config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}

    @override
    def setup_environment(self) -> None:
        # On CPUs the process group is gloo's, without the extension that DeepSpeed would compile.
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        import deepspeed.ops
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        pickle_stages_by_value()
        # DeepSpeedStrategy insists that the index of a device is the local rank, but CPUs have no index.
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @override
    def init_deepspeed(self) -> None:
        # The engine needs a device with an index, and parameters with at least one dimension. Its two buckets become no
        # larger than the model.
        assert self.lightning_module is not None
        assert self.config is not None
        parameters = list(self.lightning_module.parameters())
        for parameter in parameters:
            if not parameter.dim():
                parameter.data = parameter.data.reshape(1)
        total = sum(p.numel() for p in parameters)
        zero = self.config["zero_optimization"]
        for name in ("allgather_bucket_size", "reduce_bucket_size"):
            zero[name] = min(zero.get(name, 200_000_000), total + total % 2)
        devices = self.parallel_devices
        if isinstance(self.accelerator, CPUAccelerator):
            self.parallel_devices = [torch.device("cpu", 0)] * self.num_processes
        super().init_deepspeed()
        self.parallel_devices = devices

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        with safe_reading(), explained(f"ckpt_path: {checkpoint_path} cannot be loaded"):
            return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def on_train_start(self) -> None:
        # The gradients of an unfinished optimizer step would go into the next epoch.
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        if batches % accumulate > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError(
                f"trainer.limit_train_batches leaves {batches} micro-batches per epoch, which does not divide into "
                f"optimizer steps of {accumulate}; use a multiple."
            )

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the accumulation; DeepSpeed would do so again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def watch(trainer: Trainer, minutes: float) -> None:
    """Starts the heartbeat of the processes of a run as soon as they are connected.

    Args:
        trainer: of this process.
        minutes: how long a process may be silent, or all be stuck.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy.launcher, _SubprocessScriptLauncher):  # one process, or forks in a notebook
        return
    connect = strategy.setup_environment

    def what() -> str:
        doing = trainer.state.stage or trainer.state.fn
        return f"{doing and doing.value} in epoch {trainer.current_epoch + 1} after step {trainer.global_step}"

    def connect_and_watch() -> None:
        try:
            connect()
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            for process in strategy.launcher.procs:
                process.kill()
            raise MissingProcessError(
                f"Not all {trainer.world_size} processes have connected within {minutes:g} minutes (--silence): "
                f"{str(error).splitlines()[0].rstrip('.')}. Look at the others, and start again."
            ) from error
        if dist.is_initialized():
            _set_pg_timeout(LONGEST_COLLECTIVE)
        heartbeat.start(trainer.global_rank, trainer.world_size, what, minutes, strategy.launcher.procs)
        for thread in threading.enumerate():  # Lightning's own, which kills all without a word when one has failed
            if thread.name == "child-process-observer":
                thread._child_processes = []  # type: ignore[attr-defined]

    strategy.setup_environment = connect_and_watch
    if getattr(strategy, "_timeout", None):  # of connecting, and of collectives until all are connected
        strategy._timeout = timedelta(minutes=minutes)


def check_strategy(trainer: Trainer) -> None:
    """Refuses a strategy or a precision under which a stage would quietly compute something else."""
    if isinstance(trainer.strategy, DeepSpeedStrategy) and not isinstance(trainer.strategy, Zero2Strategy):
        raise UserError(
            "trainer.strategy: Lightning's own DeepSpeed strategies divide the loss by the accumulation twice, and "
            f"stages other than 2 are not supported here; use --trainer.strategy {NAME}."
        )
    if trainer.precision in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision {trainer.precision} rounds optimizer states and rotary frequencies to 16 bit; use "
            f"{trainer.precision.replace('true', 'mixed')}."
        )
    on_mps = isinstance(trainer.accelerator, MPSAccelerator)  # where Lightning itself refuses DDP
    if on_mps and isinstance(trainer.strategy, DeepSpeedStrategy):
        raise UserError(f"trainer.strategy {NAME} does not run on MPS; use --trainer.accelerator cpu, or no strategy.")
    if on_mps and trainer.precision == "16-mixed":
        raise UserError("trainer.precision 16-mixed needs a loss scaler, which MPS lacks; use bf16-mixed or 32-true.")


def engine_dtype(trainer: Trainer) -> torch.dtype:
    """Returns the dtype in which to load trained weights: a 16-bit engine would cast them before it copies them."""
    sixteen = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    in_engine = isinstance(trainer.strategy, Zero2Strategy)
    return sixteen.get(trainer.precision, torch.float32) if in_engine else torch.float32


@contextmanager
def full_precision(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Gives the module on rank 0, inside the block, the float32 weights of a 16-bit engine's optimizer, in CPU memory.

    All processes must enter it together. They gather one parameter at a time, so no device ever holds more than one in
    float32. A weight that was changed after the last step is taken as it is.
    """
    if not isinstance(trainer.strategy, Zero2Strategy) or trainer.precision == "32-true":
        yield
        return
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[nn.Parameter, nn.Parameter] = {}
    base = {p for p in module.parameters() if not p.requires_grad} if getattr(module, "lora", None) else set()
    for parameter in module.parameters():
        if parameter in base:  # no export of adapters reads it
            continue
        stepped = safe_get_full_fp32_param(parameter)
        current = parameter.detach()
        if stepped is None or not torch.equal(stepped.to(current.dtype), current):
            stepped = current
        if trainer.is_global_zero:
            weights[parameter] = nn.Parameter(stepped.to("cpu", torch.float32), requires_grad=False)
    own = [(m, dict(m._parameters)) for m in module.modules()]
    try:
        for m, parameters in own:
            m._parameters |= {name: weights.get(p, p) for name, p in parameters.items() if p is not None}
        yield
    finally:
        for m, parameters in own:
            m._parameters |= parameters


StrategyRegistry.register(NAME, Zero2Strategy, description="DeepSpeed ZeRO stage 2")
StrategyRegistry.register(
    f"{NAME}_offload", Zero2Strategy, description="with optimizer states in CPU memory", offload_optimizer=True
)
