"""`synthesize`: files that the DataModules read, and a small model that the stages load (D05)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.data.tokenising import load_comparisons, load_demonstrations
from rlhf.errors import UserError
from rlhf.models.loading import load_causal_lm, load_config
from rlhf.models.tokenizers import check_pad_in_embedding, load_tokenizer
from rlhf.synthetic.synthesize import MANIFEST, Sizes, SmallModel, create_model, synthesize, train_tokenizer

SIZES = Sizes(pretraining=60, train=8, validation=4, comparisons=9, comparisons_validation=6, comparisons_news=3)
MODEL = SmallModel(hidden_size=16, layers=1, heads=2, context=256, vocabulary=400)
FILES = {
    "pretraining/train.jsonl": 60,
    "demonstrations/train.jsonl": 8,
    "demonstrations/validation.jsonl": 4,
    "comparisons/train.jsonl": 9,
    "comparisons/validation.jsonl": 9,
}


def written(folder: Path, seed: int = 1, label_noise: float = 0.0) -> Path:
    synthesize(str(folder), seed, label_noise, SIZES, MODEL)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("embedded") / "new" / "folder")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_per_split_with_as_many_records_as_asked_for(output: Path) -> None:
    files = {str(f.relative_to(output)): len(rows_of(f)) for f in output.rglob("*.jsonl")}
    assert files == FILES
    batches = [pair["batch"] for pair in rows_of(output / "comparisons/validation.jsonl")]
    assert [b.startswith("cnndm") for b in batches] == [False] * 6 + [True] * 3


def test_the_folders_load_as_records_of_a_stage(output: Path) -> None:
    tokenizer = load_tokenizer(str(output / "model"))
    for folder, split, count in (("pretraining", "train", 60), ("demonstrations", "validation", 4)):
        source = Source(str(output / folder), split)
        assert len(load_demonstrations(source, "data.train", tokenizer, TextFormat())) == count
    pairs = load_comparisons(Source(str(output / "comparisons"), "validation"), "data.v", tokenizer, TextFormat())
    assert len(pairs) == 9
    assert pairs["query"][-1].startswith("Article:\n")


def test_the_same_seed_writes_the_same_and_another_something_else(output: Path, tmp_path: Path) -> None:
    again, other = written(tmp_path / "again"), written(tmp_path / "other", seed=2)
    for name in FILES:
        assert (again / name).read_bytes() == (output / name).read_bytes()
        assert (other / name).read_bytes() != (output / name).read_bytes()
    weights = [load_file(folder / "model/model.safetensors") for folder in (output, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_the_tokenizer_has_eos_and_no_pad_of_its_own(output: Path) -> None:
    raw = AutoTokenizer.from_pretrained(output / "model")
    assert raw.eos_token == "<|endoftext|>"
    assert raw.pad_token is None
    assert len(raw) <= MODEL.vocabulary
    text = "Schöne Grüße, r/relationships!\n\n\tTL;DR: 你好 🙂"
    assert raw.decode(raw(text)["input_ids"]) == text
    assert raw.eos_token_id not in raw(text)["input_ids"]


def test_the_embedding_has_a_spare_row_for_pad(output: Path) -> None:
    path = str(output / "model")
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token == "[PAD]"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    config = load_config(path, "model.model_path")
    check_pad_in_embedding(tokenizer, config, path)
    model = load_causal_lm(path)
    assert model.get_input_embeddings().num_embeddings == config.vocab_size > tokenizer.pad_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.max_position_embeddings) == (
        16,
        1,
        256,
    )


@pytest.mark.parametrize("vocabulary", [319, 320, 321])
def test_the_embedding_is_large_enough_at_the_border_of_a_multiple_of_64(tmp_path: Path, vocabulary: int) -> None:
    tokenizer = train_tokenizer(["the same old story, told again and again in other words"] * 20, 257)
    tokenizer.add_tokens([f"<{i}>" for i in range(vocabulary - len(tokenizer))])
    create_model(tmp_path, tokenizer, MODEL, seed=1)
    rows = load_config(str(tmp_path), "model.model_path").vocab_size
    assert (rows, rows % 64) == (320 if vocabulary == 319 else 384, 0)


def test_making_a_model_leaves_the_random_state_alone(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    create_model(tmp_path, tokenizer, MODEL, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output: the folder .*file cannot be created: .*file is a file"):
        written(tmp_path / "file")


def test_a_folder_belongs_to_one_set_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "data")
    assert capsys.readouterr().out.startswith(f"Written: {folder}/pretraining, {folder}/demonstrations, ")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    written(folder)
    assert "it is kept" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data was written with other settings \(seed\); choose another folder"):
        written(folder, seed=2)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    (folder / MANIFEST).rename(folder / f".{MANIFEST}")  # as after a kill
    written(folder, seed=2)
    (tmp_path / "mine" / "demonstrations").mkdir(parents=True)
    with pytest.raises(UserError, match="mine holds demonstrations, of unknown origin"):
        written(tmp_path / "mine")


def test_the_folder_of_a_running_stage_is_refused(tmp_path: Path) -> None:
    code = "from rlhf import files; from pathlib import Path; import sys\n"
    code += "with files.owned(Path(sys.argv[1])):\n    print('owned', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdin is not None
        assert owner.stdout.readline() == "owned\n"
        with pytest.raises(UserError, match=r"output: .*run is in use by process"):
            written(tmp_path / "run")
        owner.stdin.write("\n")


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heads is 9: it should divide model\.hidden_size, 128"):
        synthesize(str(tmp_path / "new"), model=SmallModel(heads=9))
    assert not (tmp_path / "new").exists()


def test_numbers_out_of_range() -> None:
    with pytest.raises(ValidationError, match="sizes\ntrain"):
        Sizes(train=-1)
    with pytest.raises(ValidationError, match="model\nlayers"):
        SmallModel(layers=0)


def test_for_a_tokenizer_only_a_model_is_written(output: Path, tmp_path: Path) -> None:
    shape = SmallModel(hidden_size=24, layers=2, heads=2)
    alone = shutil.copytree(
        output / "model", tmp_path / "alone", ignore=shutil.ignore_patterns("*config.json", "*.safetensors")
    )
    shutil.copy(output / "model" / "tokenizer_config.json", alone)  # as a tokenizer comes without a model
    synthesize(str(tmp_path / "wide"), model=shape, tokenizer=str(alone))
    assert {file.name for file in (tmp_path / "wide").iterdir()} == {"model", MANIFEST}
    mine, theirs = (load_tokenizer(str(folder / "model")) for folder in (tmp_path / "wide", output))
    assert mine.get_vocab() == theirs.get_vocab()
    assert mine.encode("my brother Alex") == theirs.encode("my brother Alex")
    config = load_config(str(tmp_path / "wide" / "model"), "model")
    assert (config.hidden_size, config.num_hidden_layers) == (24, 2)
    check_pad_in_embedding(mine, config, "model")
    with pytest.raises(UserError, match="tokenizer: there is no model folder"):
        synthesize(str(tmp_path / "other"), tokenizer=str(tmp_path / "nowhere"))
    assert not (tmp_path / "other").exists()


def test_of_no_records_there_is_no_file_and_without_pretraining_no_model(output: Path, tmp_path: Path) -> None:
    synthesize(str(tmp_path), 1, 0.0, replace(SIZES, pretraining=0, comparisons=0, comparisons_validation=0), MODEL)
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {*FILES, MANIFEST} - {"pretraining/train.jsonl", "comparisons/train.jsonl"}
    assert len(rows_of(tmp_path / "comparisons/validation.jsonl")) == SIZES.comparisons_news
    assert (tmp_path / "demonstrations/train.jsonl").read_bytes() == (
        output / "demonstrations/train.jsonl"
    ).read_bytes()
    assert json.loads((tmp_path / MANIFEST).read_text())["sizes"] == asdict(SIZES) | {
        "pretraining": 0, "comparisons": 0, "comparisons_validation": 0
    }  # fmt: skip
