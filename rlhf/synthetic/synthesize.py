"""Writes the embedded data, and a small GPT-NeoX with its own tokenizer: a pipeline needs no download."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from rlhf import files
from rlhf.data.texts import TextFormat, one_leading_space
from rlhf.errors import NonNegative, Seed, UserError
from rlhf.models.library_calls import quiet
from rlhf.models.tokenizers import load_tokenizer
from rlhf.synthetic.domains import NEWS
from rlhf.synthetic.posts import comparisons, demonstrations, pretraining

EOS_TOKEN = "<|endoftext|>"
MANIFEST = "synthesize.json"  # written last: the settings that all else in the folder was made with
BEGUN = f".{MANIFEST}"  # its name until then
CONTENTS = ("pretraining", "demonstrations", "comparisons", "model")
TOKENIZER_TEXTS = 4_000


@dataclass(frozen=True, config=ConfigDict(title="sizes"))
class Sizes:
    """Number of records of each kind; for 0 records no file is written.

    Attributes:
        pretraining: posts with TL;DRs of every honest quality, to teach a random model to read, which is then written.
        train: demonstrations to learn from.
        validation: demonstrations to measure on.
        comparisons: pairs for the reward model.
        comparisons_validation: pairs to measure its accuracy on.
        comparisons_news: pairs of the other domain, in place of CNN/DM.
    """

    pretraining: NonNegativeInt = 24_000
    train: NonNegativeInt = 4_000
    validation: NonNegativeInt = 256
    comparisons: NonNegativeInt = 8_000
    comparisons_validation: NonNegativeInt = 800
    comparisons_news: NonNegativeInt = 200


@dataclass(frozen=True, config=ConfigDict(title="model"))
class SmallModel:
    """Shape of the small GPT-NeoX (the architecture of Pythia).

    Attributes:
        hidden_size: width.
        layers: depth.
        heads: attention heads.
        context: longest sequence in tokens.
        vocabulary: largest size of the byte-level BPE; the embedding has spare rows, as Pythia's has.
    """

    hidden_size: PositiveInt = 128
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    context: PositiveInt = 512
    vocabulary: PositiveInt = 1_000


def synthesize(
    output: str,
    seed: Seed = 1,
    label_noise: NonNegative = 1.0,
    sizes: Sizes = Sizes(),
    model: SmallModel = SmallModel(),
    tokenizer: str | None = None,
) -> None:
    """Writes the embedded data (posts, demonstrations, comparisons), or a small untrained model with its tokenizer.

    The folder gets `pretraining`, `demonstrations` and `comparisons` with a JSONL file per split, `model` if there are
    data to pretrain it on, and last `synthesize.json` with these settings. A finished folder is kept.

    Args:
        output: the folder to write.
        seed: seed of everything.
        label_noise: temperature of the labeller of the comparisons; 0 gives clean labels.
        sizes: number of records of each kind.
        model: shape of the small GPT-NeoX.
        tokenizer: folder of a tokenizer; only a model for it is written, no data.
    """
    folder, texts = Path(output), TextFormat()
    if model.hidden_size % model.heads:
        raise UserError(f"model.heads is {model.heads}: it should divide model.hidden_size, {model.hidden_size}.")
    settings = {"seed": seed, "label_noise": label_noise, "sizes": asdict(sizes), "model": asdict(model)}
    settings["tokenizer"] = tokenizer
    files.check_writable(folder, "output")
    run = files.owned(folder, "output") if (folder / files.LOCK).exists() else nullcontext()
    with files.owned(folder, "output", beside=True), run:
        if _is_finished(folder, settings):
            return
        given = tokenizer and load_tokenizer(tokenizer, setting="tokenizer")
        begun = folder / BEGUN
        files.write_text(begun, json.dumps(settings, indent=2) + "\n")
        if given is not None:
            create_model(folder / "model", given, model, seed)
        else:
            _write_data(folder, seed, label_noise, sizes)
            if sizes.pretraining:
                corpus = pretraining(min(sizes.pretraining, TOKENIZER_TEXTS), seed, "pretraining")
                read = (texts.query.format(**r) + one_leading_space(r["summary"]) for r in corpus)
                create_model(folder / "model", train_tokenizer(read, model.vocabulary), model, seed)
        files.publish(begun, folder / MANIFEST)
        print(f"Written: {', '.join(str(folder / name) for name in CONTENTS if (folder / name).exists())}")


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Tells whether a folder is finished, with these settings; refuses one with others, or with data of the user."""
    if (folder / MANIFEST).is_file():
        known = json.loads((folder / MANIFEST).read_text())
        if other := [name for name, value in settings.items() if known.get(name) != value]:
            raise UserError(
                f"output: {folder} was written with other settings ({', '.join(other)}); choose another folder, or "
                "delete it."
            )
        print(f"{folder} is finished, with these settings; it is kept.")
        return True
    found = [name for name in CONTENTS if (folder / name).exists()]
    if found and not (folder / BEGUN).exists():
        raise UserError(f"output: {folder} holds {', '.join(found)}, of unknown origin; choose another folder.")
    return False


def _write_data(folder: Path, seed: int, noise: float, sizes: Sizes) -> None:
    _write(folder / "pretraining" / "train.jsonl", pretraining(sizes.pretraining, seed, "pretraining"))
    for split, n in (("train", sizes.train), ("validation", sizes.validation)):
        _write(folder / "demonstrations" / f"{split}.jsonl", demonstrations(n, seed, split))
    _write(folder / "comparisons" / "train.jsonl", comparisons(sizes.comparisons, seed, "train", noise))
    posts = comparisons(sizes.comparisons_validation, seed, "validation", noise)
    news = comparisons(sizes.comparisons_news, seed, "validation", noise, NEWS, "cnndm")
    _write(folder / "comparisons" / "validation.jsonl", chain(posts, news))


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if text:
        files.write_text(file, text)
    else:
        file.unlink(missing_ok=True)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Trains a byte-level BPE tokenizer with EOS and without PAD, like Pythia's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS_TOKEN, bos_token=EOS_TOKEN)


def create_model(folder: Path, tokenizer: Any, shape: SmallModel, seed: int) -> None:
    """Writes a GPT-NeoX with random weights, as a Hugging Face folder."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=(len(tokenizer) + 1 + 63) // 64 * 64,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden_size,
        max_position_embeddings=shape.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
