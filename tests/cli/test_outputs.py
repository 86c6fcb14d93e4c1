"""What all commands that write have in common: one process owns the output, and a full disk is a sentence."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from rlhf.cli.main import main
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import load_tokenizer
from rlhf.report import report as report_file
from rlhf.synthetic.posts import comparisons, demonstrations

ROOT = Path(__file__).parents[2]
OUTPUTS = {  # command -> what it writes
    "generate": "new.parquet", "margins": "m.csv", "judge": "new-judged.csv", "report": "page/report.md",
    "synthesize": "data", "export": "exported", "predict": "sft/predictions",
}  # fmt: skip

SIZES = [f"--sizes.{name}=40" for name in ("pretraining", "train", "validation", "comparisons")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def words(folder: Path, model_path: str) -> dict[str, list[str]]:
    """The words of each command, after those that make what it takes."""
    for name, rows in {"d": demonstrations(8, 1, "train"), "c": comparisons(64, 1, "train", 0)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ScalarModel.from_policy(model_path, seed=3).save(folder / "reward", load_tokenizer(model_path))
    data = [f"--data.{split}={{'path': '{folder}/d.jsonl', 'split': 'train'}}" for split in ("train", "validation")]
    stage = [
        f"--config={ROOT}/configs/quickstart/sft.yaml", f"--run_dir={folder}/sft", f"--model.model_path={model_path}",
        "--model.response_length=8", *data, "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    generated = ["generate", f"--model={model_path}", f"--data.path={folder}/d.jsonl", "--response_length=8"]
    judged = ["judge", f"--a.table={folder}/r.parquet", "--b.column=reference", f"--b.table={folder}/r.parquet"]
    judged += ["--judge=GoldJudge"]
    main(["fit", *stage])
    main([*generated, f"--output={folder}/r.parquet"])
    main([*judged, f"--output={folder}/judged.csv"])
    run = {"size": "s", "parameters": None, "seed": 1, "policies": {"SFT": str(folder / "judged.csv")}}
    return {
        "generate": [*generated, f"--output={folder}/new.parquet"],
        "margins": [
            "margins",
            f"--reward={folder}/reward",
            f"--data.path={folder}/c.jsonl",
            f"--output={folder}/m.csv",
        ],
        "judge": [*judged, f"--output={folder}/new-judged.csv"],
        "report": ["report", f"--runs={json.dumps([run])}", f"--output={folder}/page"],
        "synthesize": ["synthesize", f"--output={folder}/data", *SIZES],
        "export": ["export", f"--checkpoint={folder}/sft/checkpoints/last.ckpt", f"--output={folder}/exported"],
        "predict": ["predict", *stage],
    }


def inside(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "sft/" not in str(path)}


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_another_process_writes_is_refused(
    command: str,
    words: dict[str, list[str]],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report_file, "PATIENCE", 0.1)
    place = folder / OUTPUTS[command]
    place.parent.mkdir(exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        before = inside(folder)
        with pytest.raises(SystemExit) as stop:
            main(words[command])
        assert inside(folder) == before
    assert stop.value.code == 2
    assert f"{place} is in use by another process" in capsys.readouterr().err


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Within, no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_full_disk_is_one_sentence(
    command: str, words: dict[str, list[str]], folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = folder / OUTPUTS[command]
    monkeypatch.setattr("rlhf.modules.stage_module.rehearse_export", lambda *args: None)  # into another folder
    with small_disk(100_000 if command == "export" else 1000), pytest.raises(SystemExit) as stop:
        main(words[command])
    assert stop.value.code == 2
    assert "File too large" in (said := capsys.readouterr().err)
    assert "Free some space; the same command goes on" in said
    if command != "synthesize":  # whose last file is synthesize.json
        whole = [path for path in place.parent.glob(f"{place.name}*") if not path.name.endswith((".json", ".parts"))]
        assert whole == []
    main(words[command])
    assert [*place.parent.glob(f"{place.name}*")]
