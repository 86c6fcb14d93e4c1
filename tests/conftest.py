"""Small tokenizers, models and records that the tests make themselves."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch import Trainer
from tokenizers.processors import TemplateProcessing
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from rlhf.cli.main import main
from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.loaders import Batch, Plan, PlannedBatches
from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat, one_leading_space
from rlhf.models import backbone
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.sampling import token_readers
from rlhf.studies.processes import Ended, stage_processes
from rlhf.synthetic.domains import NEWS
from rlhf.synthetic.posts import comparisons, demonstrations
from rlhf.synthetic.synthesize import SmallModel, create_model, train_tokenizer

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
logging.raiseExceptions = False  # handlers of libraries outlive the stream that a test captured


ON_DEVICE = {"ops", "models", "sampling"}  # folders of tests whose tensors `--device` makes on that device


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets the tests run on a GPU: `pytest --device cuda tests/ops tests/models tests/sampling tests/modules`."""
    parser.addoption("--device", default="cpu", help="where tensors of ops, models and sampling, and Trainers, are")


def pytest_configure(config: pytest.Config) -> None:
    """Makes markers known."""
    config.addinivalue_line("markers", "vllm: runs an engine of vLLM; skipped where it is not installed")
    config.addinivalue_line("markers", "cpu_only(reason): the subject is what the CPU alone does; skipped on a GPU")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device under test."""
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test begins with the same random numbers, whichever tests ran before it in its process."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.manual_seed(0)


class OnDevice(TorchFunctionMode):
    """Makes every new tensor on the CPU, so that random numbers are the same everywhere, and moves it to a device.

    Random numbers in place are made there, too. numpy gets copies on the CPU.
    """

    in_place: ClassVar = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.random_, torch.nn.init.normal_}

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a function of torch."""
        kwargs = kwargs or {}
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):  # numpy reads the CPU's memory only
            args = (args[0].cpu(), *args[1:])
        if func in self.in_place:
            filled, *others = args or [kwargs.pop("tensor")]  # as torch.nn.init hands it over
            with torch.no_grad():
                return filled.copy_(func(torch.empty_like(filled, device="cpu"), *others, **kwargs))
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        return made.detach().to(self.device).requires_grad_(made.requires_grad)


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the tensors and models of a test on the device under test, and moves those of its file there."""
    if device == "cpu" or request.path.parent.name not in ON_DEVICE:
        yield
        return
    from transformers import PreTrainedModel

    for name in ("from_pretrained", "_from_config"):
        monkeypatch.setattr(PreTrainedModel, name, classmethod(_moved(getattr(PreTrainedModel, name).__func__, device)))
    for name, value in list(vars(request.module).items()):
        if isinstance(value, torch.Tensor):
            monkeypatch.setattr(request.module, name, value.to(device))
        elif isinstance(value, tuple) and value and all(isinstance(x, torch.Tensor) for x in value):
            monkeypatch.setattr(request.module, name, tuple(x.to(device) for x in value))
    with OnDevice(device):
        yield


def _moved(make: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Lets a method of models make on the CPU what it makes, a model or a tuple that begins with one, and move it."""

    def make_and_move(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type == "meta":  # a model without memory stays one
            return make(cls, *args, **kwargs)
        with torch.device("cpu"):
            made = make(cls, *args, **kwargs)
        return (made[0].to(device), *made[1:]) if isinstance(made, tuple) else made.to(device)

    return make_and_move


@pytest.fixture(autouse=True)
def _cpu_only(request: pytest.FixtureRequest, device: str) -> None:
    """Skips a test whose subject is what the CPU alone does."""
    marker = request.node.get_closest_marker("cpu_only")
    if marker and device != "cpu":
        pytest.skip(f"with --device {device}: {marker.args[0]}")


@pytest.fixture(autouse=True)
def _vllm(request: pytest.FixtureRequest) -> None:
    """Skips a test that needs vLLM where it is not installed."""
    if request.node.get_closest_marker("vllm") and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


@pytest.fixture(scope="session")
def from_config() -> Callable[[Any], Any]:
    """Builds a language model whose context matters: random weights of standard deviation 0.2."""
    from transformers import AutoModelForCausalLM

    def build(config: Any) -> Any:
        config.initializer_range = 0.2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture(params=["packed", "padded"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> str:
    """Models get packed rows if they take them, which those in float32 do on a CPU only, or padded ones; which."""
    if request.param == "padded":
        for user in (backbone, token_readers):
            monkeypatch.setattr(user, "packs", lambda _: False)
    return str(request.param) if device == "cpu" else "padded"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE trained on embedded posts, with [PAD]."""
    query = TextFormat().query
    texts = [query.format(**r) + one_leading_space(r["summary"]) for r in demonstrations(200, 1, "train")]
    tokenizer = train_tokenizer(texts, 500)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a tiny GPT-NeoX with random weights and the tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    create_model(folder, tokenizer, SmallModel(hidden_size=32, layers=2, heads=2, context=512), seed=1)
    return str(folder)


@pytest.fixture(scope="session")
def wide_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a tiny GPT-NeoX whose heads, of 32, vLLM takes on a CPU."""
    folder = tmp_path_factory.mktemp("wide")
    create_model(folder, tokenizer, SmallModel(hidden_size=64, layers=2, heads=2, context=512), seed=1)
    return str(folder)


@pytest.fixture(scope="session")
def chat_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a tiny model whose tokenizer has a ChatML template, ends turns with EOS, and puts BOS before texts."""
    chat = copy.deepcopy(tokenizer)
    chat.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    chat.eos_token = "<|im_end|>"
    chat.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{chat.bos_token} $A", special_tokens=[(chat.bos_token, chat.bos_token_id)]
    )
    chat.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = tmp_path_factory.mktemp("chat")
    create_model(folder, chat, SmallModel(hidden_size=32, layers=2, heads=2, context=512), seed=1)
    return str(folder)


@pytest.fixture(scope="session")
def llama_tokenizer() -> Any:
    """A tokenizer of the Llama-2 kind: a blank before every text, byte fallback, BOS, no PAD."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [record["post"] for record in demonstrations(16, 1, "train")]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    model = json.loads(trained.to_str())["model"]
    known = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *list(model["vocab"])[3:]]
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE({token: n for n, token in enumerate(known)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizer
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory, llama_tokenizer: Any, from_config: Callable[..., Any]) -> str:
    """Folder of a tiny Llama with random weights, that tokenizer, and a row for a PAD."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=len(llama_tokenizer) + 1, max_position_embeddings=512, **shape)
    folder = tmp_path_factory.mktemp("llama")
    from_config(config).save_pretrained(folder)
    llama_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[dict[str, Any]]], str]:
    """Writes records to a JSONL file below the test's folder and returns its path."""

    def write(name: str, records: Iterable[dict[str, Any]]) -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(file)

    return write


@pytest.fixture(scope="session", params=["gpt_neox", "gpt2"])
def sharp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a tiny model with rotary or learned positions, weights so large that context and positions matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    shape |= {"intermediate_size": 64} if request.param == "gpt_neox" else {"n_inner": 64}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = AutoConfig.for_model(
        request.param, vocab_size=512, initializer_range=0.2, use_cache=True, **shape, **special
    )
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------ a stage in a few lines: data, and a Trainer


@pytest.fixture
def demonstration_file(write_jsonl: Callable[..., str]) -> str:
    """32 demonstrations."""
    return write_jsonl("demonstrations.jsonl", demonstrations(32, 1, "train"))


@pytest.fixture
def comparison_file(write_jsonl: Callable[..., str]) -> str:
    """24 comparisons, 8 of them news."""
    news = islice(comparisons(8, 1, "validation", 0, NEWS, "cnndm"), 8)
    return write_jsonl("comparisons.jsonl", [*comparisons(16, 1, "validation", 0), *news])


@pytest.fixture
def reward_path(model_path: str, tmp_path: Path) -> str:
    """A reward model with a random head and a shift."""
    model = ScalarModel.from_policy(model_path, seed=3)
    model.bias.data.fill_(0.25)
    folder = tmp_path / "reward_model"
    model.save(folder, load_tokenizer(model_path))
    return str(folder)


@pytest.fixture
def sft_data(demonstration_file: str) -> Callable[..., SFTDataModule]:
    """An SFTDataModule over the demonstrations."""

    def make(**settings: Any) -> SFTDataModule:
        source = Source(demonstration_file)
        defaults: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 16}
        return SFTDataModule(source, source, **(defaults | settings))

    return make


@pytest.fixture
def preference_data(comparison_file: str, demonstration_file: str) -> Callable[..., PreferenceDataModule]:
    """A PreferenceDataModule over the comparisons."""

    def make(**settings: Any) -> PreferenceDataModule:
        source = Source(comparison_file)
        defaults: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 16}
        return PreferenceDataModule(source, source, demonstrations=Source(demonstration_file), **(defaults | settings))

    return make


@pytest.fixture
def rollout_data(demonstration_file: str) -> Callable[..., RolloutDataModule]:
    """A RolloutDataModule over the demonstrations."""

    def make(**settings: Any) -> RolloutDataModule:
        source = Source(demonstration_file)
        defaults: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "rollout_batch_size": 4}
        return RolloutDataModule(source, Source(demonstration_file, limit=6), **(defaults | settings))

    return make


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """Makes a batch of some rows of a split."""

    def batch_of(datamodule: Any, split: str, rows: list[int], real: bool = True) -> Batch:
        return PlannedBatches(datamodule.splits[split], datamodule.collate(split))[Plan(rows, real)]

    return batch_of


@pytest.fixture
def trainer(tmp_path: Path, device: str) -> Callable[..., Trainer]:
    """A quiet Trainer on the device under test, from a fixed seed."""

    def make(**settings: Any) -> Trainer:
        L.seed_everything(7, verbose=False)
        defaults: dict[str, Any] = {
            "accelerator": device, "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path / "run",
        }  # fmt: skip
        return Trainer(**(defaults | settings))

    return make


@pytest.fixture(scope="session")
def driver() -> Iterator[Callable[..., list[int]]]:
    """Runs a command of train.py as one or several processes that need not import anything; see driver.py.

    Takes its words, the number of processes, the file to which they append what they print, and whether each is a node;
    returns their exit statuses.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "driver.py")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(words: list[str], processes: int, log: Path, nodes: bool = False) -> list[int]:
            order = {"words": words, "processes": processes, "log": str(log), "nodes": nodes}
            print(json.dumps(order), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture(scope="session")
def in_this_process() -> Callable[[pytest.MonkeyPatch], list[list[str]]]:
    """Runs the stages in this process, which saves their start, and keeps their commands."""

    def patch_stages(patch: pytest.MonkeyPatch) -> list[list[str]]:
        seen: list[list[str]] = []

        def run(words: list[str], log: Path | None = None) -> Ended:
            seen.append(words)
            start = time.monotonic()
            main(words)
            return Ended(0, time.monotonic() - start, 0.0)

        patch.setattr(stage_processes, "run", run)
        patch.setattr(stage_processes, "warm_up", lambda: None)
        return seen

    return patch_stages


@pytest.fixture
def commands(in_this_process: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the stages of this test in this process, and keeps their commands."""
    return in_this_process(monkeypatch)
