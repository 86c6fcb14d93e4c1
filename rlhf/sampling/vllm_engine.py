"""A handle of vLLM's engine, which runs in a process beside this one, on the same device."""

from __future__ import annotations

import copy
import os
import signal
from importlib.util import find_spec
from multiprocessing.util import Finalize
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp

from rlhf.errors import UserError
from rlhf.models.merging import merged_weights
from rlhf.sampling.vllm_process import Shape, serve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LOOK_EVERY = 0.2  # seconds between two looks at whether the engine has answered


def check_vllm(setting: str) -> None:
    """Refuses a setting that takes vLLM where it is not installed, or would not start."""
    if find_spec("vllm") is None:
        raise UserError(f"{setting} vllm needs vLLM, which is not installed here: see docs/vllm.md, or leave it out.")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:True" in os.environ.get(name, "") and torch.cuda.is_available():
            raise UserError(f"{setting} vllm cannot share memory that {name} makes expandable; unset {name}.")


class Engine:
    """Starts an engine, and asks it; it ends with this object, or with this process.

    Args:
        folder: has the config of its model.
        shape: what it is made for.
        setting: that asked for vLLM, for error messages.
        advice: what to do if the engine lacks memory.
    """

    def __init__(self, folder: str, shape: Shape, setting: str, advice: str) -> None:
        self.shape, self._setting, self._advice = shape, setting, advice
        spawn = mp.get_context("spawn")
        self._connection, other = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(other, folder, shape, torch.get_num_threads()), daemon=True)
        self.process.start()
        other.close()
        # Before multiprocessing waits for it at the end of this process.
        self.close = Finalize(self, _end, (self._connection, self.process), exitpriority=0)
        self.answer()

    def ask(self, command: str, argument: Any = None) -> Any:
        """Sends a command, and returns the answer."""
        self.send((command, argument))
        return self.answer()

    def send(self, message: Any) -> None:
        """Sends a message; tensors move to memory that both processes share."""
        try:
            self._connection.send(message)
        except RuntimeError as error:
            self.close()
            raise UserError(
                f"{self._setting} vllm: a weight could not be moved to shared memory ({str(error).splitlines()[0]}); "
                "make /dev/shm larger (of a container: --shm-size)."
            ) from error
        except OSError:
            self.answer()

    def answer(self) -> Any:
        """Receives an answer.

        Raises:
            UserError: if the engine has failed, or died.
        """
        try:
            while not self._connection.poll(LOOK_EVERY):  # so the heartbeat sees that it is not stuck
                pass
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode or 0
            how = f"by {signal.Signals(-code).name} (was the memory full?)" if code < 0 else "of the error above"
            error = f"its process has died {how}"
        if error is not None:
            self.close()
            why = " ".join(error.split())[:300].rstrip(".")
            raise UserError(f"{self._setting} vllm: the engine has failed: {why}. {self._advice}")
        return answer


def start_engine(model: PreTrainedModel, shape: Shape, setting: str, advice: str) -> Engine:
    """Starts an engine for a model, which has no weights yet. Arguments as for `Engine`."""
    with TemporaryDirectory() as folder:
        _config(model).save_pretrained(folder)
        return Engine(folder, shape, setting, advice)


def hand_over(model: PreTrainedModel, dtype: torch.dtype, engine: Engine) -> None:
    """Gives an engine the weights of a model, with adapters merged into them."""
    engine.send(("load", None))
    for name, weight in merged_weights(model):
        # A copy: what is sent is shared from then on, and the trained weights are not.
        kind = dtype if weight.is_floating_point() else weight.dtype
        moved = weight.to(engine.shape.device, kind, copy=True)
        engine.send((name, moved.contiguous()))
        engine.answer()
    engine.send(None)
    engine.answer()


def _config(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns the config of the model as it is: an adapter may have unshared an embedding."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)  # the weights that are handed over are not quantized
    if config.get_text_config().tie_word_embeddings:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        config.get_text_config().tie_word_embeddings = inputs.weight is outputs.weight
    return config


def _end(connection: Any, process: Any) -> None:
    connection.close()  # it ends by itself then
    process.join(10)
    if process.is_alive():
        process.kill()
