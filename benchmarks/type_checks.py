"""Checks a type of model in the three stages against plain transformers: row by row, without cache and padding."""

from __future__ import annotations

import json
import string
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from model_types import tiny_model
from torch import Tensor

from rlhf.callbacks.export import Export
from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.modules import PPOModule, PPOSettings, RewardModule, SFTModule
from rlhf.sampling.paths import reader_for
from rlhf.sampling.rollout import Rollout
from rlhf.sampling.token_readers import KeyValueReader, Reader, StateReader, WholeReader

TOLERANCE = 1e-4  # of every number, relative to the largest of its kind or to 1
LENGTHS = (2, 11, 5, 17, 3, 8, 13, 4, 9, 2, 6, 15)  # of the queries, in tokens
RESPONSE_LENGTH = 24
TEMPERATURE = 0.5
SEEDS = 8  # of which one must give responses that end early and others that do not
FIRST_WORD = 6  # token ids below are special

SAMPLING: dict[type[Reader], str] = {
    KeyValueReader: "cache",
    StateReader: "own state",
    WholeReader: "no cache",
}
Status = Literal["passes", "refused", "wrong", "crashes"]


@dataclass
class Result:
    """Says what became of a stage or type: `detail` is the kind of number that differs most, or what was said."""

    status: Status
    detail: str = ""
    difference: float = 0.0


@dataclass
class TypeResult:
    """Says what became of a type in each stage."""

    model_type: str
    stages: dict[str, Result] = field(default_factory=dict)
    head: str = ""  # whose class the reward model has
    sampling: str = ""  # how the policy samples

    @property
    def worst(self) -> Result:
        """Returns the stage that counts: one that is wrong or crashes before one that is refused."""
        order: list[Status] = ["crashes", "wrong", "refused", "passes"]
        return min(self.stages.values(), key=lambda result: (order.index(result.status), -result.difference))


# ------------------------------------------------------------------------------------------------------------ the truth


class Truth:
    """Reads one row at a time with a model of plain transformers, without cache and padding."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.config.use_cache = False

    @torch.no_grad()
    def read(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Returns the logits `(T, V)`, and the hidden states that the output layer or its head reads `(T, H)`."""
        received: list[Tensor] = []
        parts = sorted(self.model.children(), key=lambda part: sum(p.numel() for p in part.parameters()))
        hooks = [p.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0])) for p in parts[:-1]]
        try:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        return logits.float(), received[0][0].float()

    def logprobs(self, ids: list[int], start: int, temperature: float = 1.0) -> Tensor:
        """Computes the log-probabilities of all tokens at the places of `ids[start:]`, `(T - start, V)`."""
        return (self.read(ids)[0][start - 1 : -1] / temperature).log_softmax(-1)


class Differences:
    """Keeps the largest difference of each kind of number, relative to the largest number of that kind or to 1.

    Attributes:
        found: the differences.
        facts: fields of `TypeResult` that came out.
    """

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.facts: dict[str, str] = {}

    def add(self, name: str, ours: Tensor, truth: Tensor) -> None:
        """Compares two tensors of one shape."""
        ours, truth = ours.detach().double().flatten(), truth.detach().double().flatten()
        if ours.shape != truth.shape:
            raise ValueError(f"{name}: {len(ours)} numbers instead of {len(truth)}")
        difference = (ours - truth).abs() / truth.abs().max().clamp(min=1) if len(ours) else ours.new_zeros(1)
        largest = difference.nan_to_num(nan=torch.inf).max().item()
        self.found[name] = max(largest, self.found.get(name, 0.0))


# ---------------------------------------------------------------------------------------- stages that keep what they do


class RecordedSFT(SFTModule):
    """Keeps the losses of its first step."""

    first: Any = None

    def token_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Computes the losses, and keeps the first ones."""
        result = super().token_losses(batch)
        self.first = self.first or (batch, *result)
        return result


class RecordedReward(RewardModule):
    """Keeps the rewards of its first step, and the head that gave them."""

    first: Any = None

    def scores(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Computes the rewards, and keeps the first ones."""
        result = super().scores(batch)
        self.first = self.first or (batch, torch.cat(result), self.model.head_weight.detach().clone())
        return result


class RecordedPPO(PPOModule):
    """Keeps its first rollout, and what it was sampled with."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.drawn: list[tuple[Tensor, ...]] = []
        self.collected: Any = None

    def sample_responses(self, queries: Tensor, query_mask: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
        """Samples, and keeps queries, random numbers and responses."""
        responses = super().sample_responses(queries, query_mask, temperature, uniforms)
        self.drawn.append((queries, query_mask, uniforms, responses))
        return responses

    def rollout(self, batch: dict[str, Any], update: int) -> Rollout:
        """Collects a rollout, and keeps it."""
        self.collected = super().rollout(batch, update)
        return self.collected


def real(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Returns the real tokens of each row."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def fit(module: Any, data: Any, folder: Path, seed: int = 1) -> Path:
    """Trains for one epoch and returns the folder of the export."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[Export()],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return folder / "export"


# ----------------------------------------------------------------------------------------------------------- the checks


def check_sft(folder: Path) -> Differences:
    """Compares losses and export of a step of SFT."""
    module = RecordedSFT(str(folder / "base"), loss_on="all", response_length=RESPONSE_LENGTH)
    data = SFTDataModule(Source(str(folder / "demonstrations.jsonl")), batch_size=12, micro_batch_size=6)
    export = fit(module, data, folder / "sft")
    differences, base = Differences(), Truth(folder / "base")
    batch, losses, mask = module.first
    for row, ids in enumerate(real(batch["input_ids"], batch["attention_mask"])):
        truth = base.logprobs(ids, 1)[range(len(ids) - 1), ids[1:]]
        counts = mask[row, : len(truth)]
        differences.add("losses of SFT", losses[row, : len(truth)][counts], -truth[counts])
    compare_export(differences, "export of SFT", export, module.model)
    return differences


def compare_export(differences: Differences, name: str, export: Path, trained: Any) -> None:
    """Compares an export, loaded with plain transformers, with the model that was trained."""
    again = Truth(export).model.state_dict()
    weights = trained.state_dict()
    if again.keys() != weights.keys():
        raise ValueError(f"{name}: other weights than those that were trained: {again.keys() ^ weights.keys()}")
    for key in again:
        differences.add(name, again[key], weights[key])


def check_reward(folder: Path) -> Differences:
    """Compares rewards and export of a step of the reward model."""
    module = RecordedReward(str(folder / "sft" / "export"))
    data = PreferenceDataModule(Source(str(folder / "comparisons.jsonl")), batch_size=6, micro_batch_size=6)
    export = fit(module, data, folder / "reward")
    differences, policy = Differences(), Truth(folder / "sft" / "export")
    batch, rewards, head = module.first
    rows = real(batch["input_ids"], batch["attention_mask"])
    truth = torch.cat([policy.read(ids)[1][-1:] @ head.T for ids in rows])
    differences.add("rewards", rewards, truth)
    again = Scorer(export)
    theirs = torch.stack([again.read(ids) for ids in rows])
    with torch.no_grad():
        ours = torch.cat([module.model.score(torch.tensor([ids]), torch.ones(1, len(ids)).long()) for ids in rows])
    differences.add("export of the reward model", theirs, ours)
    made_of = type(module.model.model)
    is_theirs = getattr(sys.modules[made_of.__module__], made_of.__name__, None) is made_of
    differences.facts["head"] = "transformers" if is_theirs else "ours"
    return differences


def check_ppo(folder: Path) -> Differences:
    """Compares samples, log-probabilities, values, scores and export of an update of PPO."""
    policy_path, reward_path = folder / "sft" / "export", folder / "reward" / "export"
    settings = PPOSettings(
        response_length=RESPONSE_LENGTH, temperature=TEMPERATURE, missing_eos_score=None, ppo_epochs=2
    )
    source = Source(str(folder / "demonstrations.jsonl"))
    for seed in range(SEEDS):
        module = RecordedPPO(str(policy_path), str(reward_path), ppo=settings)
        data = RolloutDataModule(source, batch_size=12, micro_batch_size=4)
        export = fit(module, data, folder / f"ppo-{seed}", seed)
        ended = int(module.collected.has_eos.sum())
        if len(LENGTHS) / 4 <= ended < len(LENGTHS):
            break
    else:
        raise ValueError(f"with the last of {SEEDS} seeds, {ended} of {len(LENGTHS)} responses have EOS")
    differences, policy = Differences(), Truth(policy_path)
    for drawn in module.drawn:
        compare_samples(differences, policy, module.tokenizer.eos_token_id, *drawn)
    compare_rollout(differences, module.collected, policy, Scorer(reward_path))
    differences.add("ratio before the first step", module.ratio_deviation, torch.zeros(()))
    differences.facts["sampling"] = SAMPLING[reader_for(module.actor_critic.policy)]
    compare_export(differences, "export of PPO", export, module.actor_critic.policy)
    return differences


def compare_samples(
    differences: Differences, policy: Truth, eos: int, queries: Tensor, mask: Tensor, uniforms: Tensor, given: Tensor
) -> None:
    """Compares each sampled token with the one at its random number in the cumulative distribution.

    The difference is by how much of the distribution the random number lies outside the token's own part.
    """
    for query, numbers, response in zip(real(queries, mask), uniforms.double(), given.tolist(), strict=True):
        response = response[: response.index(eos) + 1] if eos in response else response
        if eos not in response and len(response) < RESPONSE_LENGTH:
            raise ValueError(f"a response ends after {len(response)} tokens without EOS")
        probabilities = policy.logprobs(query + response, len(query), TEMPERATURE).double().exp()
        steps = range(len(response))
        end = probabilities.cumsum(-1)[steps, response]
        start, number = end - probabilities[steps, response], numbers[: len(response)]
        differences.add("samples", torch.maximum(start - number, number - end).clamp(min=0), torch.zeros(len(response)))


class Scorer:
    """Reads one row at a time with an exported reward model, to its end, which PAD may be."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
        self.model.config.use_cache, self.model.config.pad_token_id = False, -1

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """Computes the reward, or value, of a sequence that ends with these tokens."""
        return self.model(input_ids=torch.tensor([ids])).logits[0, 0] - self.model.config.reward_shift


def compare_rollout(differences: Differences, rollout: Rollout, policy: Truth, critic: Scorer) -> None:
    """Compares the numbers of each episode."""
    for row, query in enumerate(real(rollout.queries, rollout.query_mask)):
        length, start = int(rollout.lengths[row]), len(query)
        ids = query + rollout.responses[row, :length].tolist()
        truth = policy.logprobs(ids, start, TEMPERATURE)[range(length), ids[start:]]
        columns = [0, length // 2, int(rollout.value_mask[row].sum()) - 1]
        values = torch.stack([critic.read(ids[: start + column]) for column in columns])
        differences.add("log-probabilities", rollout.logprobs[row, :length], truth)
        differences.add("log-probabilities of the reference", rollout.ref_logprobs[row, :length], truth)
        differences.add("values", rollout.values[row, columns], values)
        differences.add("scores", rollout.scores[row], critic.read(ids))


STAGES: dict[str, Callable[[Path], Differences]] = {"SFT": check_sft, "reward model": check_reward, "PPO": check_ppo}


def check_type(model_type: str, folder: Path) -> TypeResult:
    """Runs the three stages of a type in an empty folder; a stage that fails is the last one."""
    result = TypeResult(model_type)
    write_task(model_type, folder)
    for name, check in STAGES.items():
        result.stages[name] = stage = attempt(check, folder, result)
        if stage.status in ("refused", "crashes"):
            break
    return result


def attempt(check: Callable[[Path], Differences], folder: Path, result: TypeResult) -> Result:
    """Runs a check and says what became of it; facts go into the result."""
    try:
        differences = check(folder)
    except UserError as error:
        return Result("refused", str(error).replace(str(folder), "runs"))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        return Result("crashes", f"{type(error).__name__} in {place}: {str(error).splitlines()[:1]}")
    found = differences.found
    vars(result).update(differences.facts)
    name = max(found, key=lambda name: found[name])
    return Result("passes" if found[name] <= TOLERANCE else "wrong", name, found[name])


# ------------------------------------------------------------------------------------------------------ models and data


def write_task(model_type: str, folder: Path) -> None:
    """Writes a tiny model with its tokenizer, demonstrations and comparisons.

    EOS is a token that about half of some responses of the model hold, so that a part of the responses ends early.
    """
    model = tiny_model(model_type)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(FIRST_WORD, vocabulary, (len(LENGTHS), 5), generator=generator)
    model.config.use_cache = False
    with torch.no_grad():
        for _ in range(RESPONSE_LENGTH):
            weights = (model(input_ids=ids).logits[:, -1] / TEMPERATURE).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(weights, 1, generator=generator)], 1)
    in_query, in_response = (F.one_hot(part, vocabulary).amax(1) for part in (ids[:, :5], ids[:, 5:]))
    rows_with = (in_response * (1 - in_query)).sum(0)  # which no query will hold
    eos = FIRST_WORD + int((rows_with[FIRST_WORD:] - len(LENGTHS) // 2).abs().argmin())
    model.config.use_cache = True
    model.config.eos_token_id = eos
    if model.generation_config is not None:
        model.generation_config.eos_token_id = eos
    model.save_pretrained(folder / "base")
    letters = write_tokenizer(eos, folder / "base")

    def text(length: int) -> str:
        return "".join(letters[n] for n in torch.randint(len(letters), (length,), generator=generator).tolist())

    rows = [{"prompt": text(n), "completion": " " + text(3 + n % 4)} for n in LENGTHS]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": text(n), "chosen": " " + text(4), "rejected": " " + text(6)} for n in LENGTHS[:6]]
    (folder / "comparisons.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def write_tokenizer(eos: int, folder: Path) -> str:
    """Writes a tokenizer of one token per character, with special tokens, and returns the letters that it knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {0: "[UNK]", 1: "[PAD]", 3: "[BOS]", 5: "\u0120"}  # the last is how such tokenizers write a blank
    names |= dict(enumerate(string.ascii_letters + string.digits, FIRST_WORD)) | {eos: "[EOS]"}
    characters = Tokenizer(models.BPE({name: n for n, name in names.items()}, [], unk_token="[UNK]"))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=characters, **special).save_pretrained(folder)
    return "".join(name for name in names.values() if name.isascii() and len(name) == 1)
