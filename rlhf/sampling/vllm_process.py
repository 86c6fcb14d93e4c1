"""The process in which vLLM runs. What it changes in torch and transformers, and its memory, stay there."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
ALONE["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # that of torchrun is for its own processes
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
TOGETHER = 8192  # tokens of prompts that are read together
CACHE_GIB = 4.0  # of keys and values, where nothing else is set


class Shape(NamedTuple):
    """What an engine is made for.

    Attributes:
        dtype: of weights and cache.
        device: where it runs.
        room: the longest query with its response, in tokens.
        cache_gib: memory of the cache of keys and values.
        sleeps: whether it gives its memory back between calls, on a GPU.
    """

    dtype: torch.dtype
    device: torch.device
    room: int
    cache_gib: float
    sleeps: bool = False


class Request(NamedTuple):
    """Prompts, a seed for each, and how to sample."""

    prompts: list[list[int]]
    seeds: list[int]
    temperature: float
    eos_ids: list[int]
    longest: int  # tokens of a response


def serve(connection: Connection, folder: str, shape: Shape, threads: int) -> None:
    """Answers the requests that come over a connection, until its other end is gone; an error is an answer, too.

    A request is a command and its argument, an answer an error or None, and a result. First it answers that it has
    started. After "load" each weight is a request that is answered; None ends them, and the command is answered then.
    """
    # A signal that is sent to all processes is for the training, which still needs an engine until its update is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = _engine(folder, shape, threads)
        connection.send((None, None))
        while True:
            command, argument = connection.recv()
            if command == "load":
                _load(engine, connection)
            answers: dict[str, Callable[[Any, Any], Any]] = {"sample": _sample, "read": _read}
            connection.send((None, answers[command](engine, argument) if command in answers else None))
    except EOFError:
        return
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        connection.send((f"{type(error).__name__} in {place.filename}:{place.lineno}: {error}", None))


def _engine(folder: str, shape: Shape, threads: int) -> Any:
    on_gpu = shape.device.type == "cuda"
    os.environ |= {**ALONE, "LOCAL_RANK": str(shape.device.index or 0), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {name: os.environ.get(name, value) for name, value in QUIET.items()}
    if not on_gpu:  # compiling takes longer than it saves
        os.environ |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
    from vllm import LLM

    return LLM(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",  # the model's own weights come before the first call
        dtype=shape.dtype,
        max_model_len=shape.room,
        generation_config="vllm",  # not that of the model
        logprobs_mode="processed_logprobs",  # at the temperature of the sampling
        enable_prefix_caching=False,  # it would outlive its weights
        enable_chunked_prefill=False,  # the random numbers of half a prompt cannot be taken back on a CPU
        max_num_batched_tokens=max(shape.room, TOGETHER),
        kv_cache_memory_bytes=int(shape.cache_gib * 2**30),
        gpu_memory_utilization=0.01,  # it refuses a GPU of which less than this is free, and the training is on it, too
        enable_sleep_mode=on_gpu and shape.sleeps,
        enforce_eager=not on_gpu,
        distributed_executor_backend="external_launcher",  # which takes LOCAL_RANK for the GPU
        disable_log_stats=True,
        seed=0,
    )


def _load(engine: Any, connection: Connection) -> None:
    """Takes the weights that follow, one at a time, so that no second copy of all of them is needed."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        while (received := connection.recv()) is not None:
            yield received
            connection.send((None, None))

    if engine.model_config.enable_sleep_mode:
        engine.wake_up(tags=["weights"])
    engine.collective_rpc(_reload, args=(weights(),))


def _reload(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Loads weights, of which none of the model's may be missing; vLLM itself goes on with those of before."""
    model, loaded = worker.model_runner.get_model(), set[str]()
    names = {name for name, _ in model.named_parameters()}
    load = model.load_weights

    def load_weights(weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        loaded.update(load(weights) or names)  # some models do not tell
        return loaded

    model.load_weights = load_weights
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    if missing := sorted(names - loaded):
        raise ValueError(f"it was not given the weights {', '.join(missing)}")


def _sample(engine: Any, request: Request) -> list[tuple[list[int], list[float]]]:
    """Samples token ids and their log-probabilities, from the full distribution; then the engine sleeps, if it can."""
    from vllm import SamplingParams

    sleeps = engine.model_config.enable_sleep_mode
    if sleeps:
        engine.wake_up(tags=["kv_cache"])
    shared: dict[str, Any] = {"temperature": request.temperature, "max_tokens": request.longest, "logprobs": 0}
    shared |= {"stop_token_ids": request.eos_ids, "ignore_eos": True, "detokenize": False}
    prompts = [{"prompt_token_ids": ids} for ids in request.prompts]
    found = engine.generate(prompts, [SamplingParams(seed=seed, **shared) for seed in request.seeds], use_tqdm=False)
    if sleeps:
        engine.sleep(level=2)
    return [_response(one.outputs[0]) for one in found]


def _read(engine: Any, prompts: list[list[int]]) -> list[list[float]]:
    """Computes the log-probability of each token after those before it; that of the first one is 0."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": ids} for ids in prompts]
    found = engine.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
    return [
        [0.0, *(known[id_].logprob for known, id_ in zip(one.prompt_logprobs[1:], ids[1:], strict=True))]
        for one, ids in zip(found, prompts, strict=True)
    ]


def _response(output: Any) -> tuple[list[int], list[float]]:
    ids = list(output.token_ids)
    return ids, [known[id_].logprob for known, id_ in zip(output.logprobs, ids, strict=True)]
