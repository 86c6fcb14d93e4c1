"""The command `export`: refusals, its card, and what it sends to the hub, which is a small server here."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from rlhf.callbacks.checkpoint_io import read_weights
from rlhf.cli.main import main
from rlhf.errors import UserError
from rlhf.models.loading import model_fingerprint
from rlhf.synthetic.posts import demonstrations

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Path:
    """A finished SFT run that kept its best export."""
    return trained(tmp_path_factory.mktemp("runs"), model_path)


def trained(folder: Path, model_path: str, *words: str) -> Path:
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations(8, 1, "train")))
    data = [f"--data.{split}={{'path': '{folder}/d.jsonl', 'split': 'train'}}" for split in ("train", "validation")]
    main([
        "fit", f"--config={ROOT}/configs/quickstart/sft.yaml", f"--run_dir={folder}/sft",
        f"--model.model_path={model_path}", "--model.response_length=2", *data, "--data.batch_size=4",
        "--data.micro_batch_size=4", "--trainer.max_epochs=3", "--trainer.callbacks+=Export",
        "--trainer.callbacks.best=validation/loss", *words,
    ])  # fmt: skip
    return folder / "sft"


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload needs; keeps the files of the last commit."""

    private: ClassVar = True  # what it says of the repository
    refusal: ClassVar = 200  # the HTTP status with which it answers all about the repository
    created: ClassVar[dict[str, Any]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    tokens: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        known = {"id": "me/mine", "private": self.private, "sha": "0" * 40, "error": "no rights"}
        self._answer(known, self.refusal)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.tokens.add(self.headers["Authorization"])
        address = f"http://{self.headers['Host']}/me/mine"
        if self.path == "/api/repos/create":
            FakeHub.created = json.loads(body)
            self._answer({"url": address, "error": "no rights"}, self.refusal)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            FakeHub.files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            self._answer({"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
        else:
            self._answer({"warnings": [], "errors": []})  # of the card's YAML

    def _answer(self, answer: Any, status: int = 200) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub on this machine, which huggingface_hub takes for the real one, and a token for it."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, value in {"private": True, "refusal": 200, "created": {}, "files": {}, "tokens": set()}.items():
        monkeypatch.setattr(FakeHub, name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield FakeHub
        server.shutdown()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["export", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_export_is_uploaded_privately_with_its_card(
    sft: Path, tmp_path: Path, hub: type[FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--checkpoint={sft}/checkpoints/last.ckpt", f"--output={tmp_path}/out", "--push_to_hub=me/mine"]
    main(["export", *words])
    assert "last.ckpt: SFTModule, epoch (PPO: update) 3, step 6" in (said := capsys.readouterr().out)
    assert "Uploaded: http://127.0.0.1" in said
    assert (hub.created["organization"], hub.created["name"]) == ("me", "mine")
    assert "private" in str(hub.created)
    assert hub.tokens == {"Bearer secret"}
    assert hub.files == files_of(tmp_path / "out")
    card = hub.files.pop("README.md").decode()
    assert hub.files == files_of(sft / "export")
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-generation"
    assert "# me/mine\n\nA language model after supervised fine-tuning. Exported after 3 epochs, 6 optimizer" in card
    assert "2. SFTModule, trained on: `d.jsonl`" in card
    assert "learning_rate: 0.0005" in card
    assert str(sft.parent) not in card
    assert "| validation/loss |" in card
    assert "Win rate" not in card


def test_an_adapter_is_uploaded_with_its_base_in_the_card_if_others_have_that_too(
    tmp_path: Path, model_path: str, hub: type[FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, model_path, "--model.lora.rank=2", "--trainer.max_epochs=1")
    words = [f"--checkpoint={run}", f"--output={tmp_path}/out", "--push_to_hub=me/mine"]
    assert f"this is an adapter of {model_path}, a folder of this machine; export it merged" in refused(words, capsys)
    assert not hub.files
    main(["export", *words, "--model.lora.export=merged"])
    assert "model.safetensors" in hub.files
    assert yaml.safe_load(hub.files["README.md"].decode().split("---")[1])["library_name"] == "transformers"
    main(["export", f"--checkpoint={run}/export_best", f"--output={tmp_path}/adapter"])
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert f"to be loaded on the base that it was trained on, `{Path(model_path).name}`." in card
    assert str(tmp_path) not in card


def test_a_repository_that_others_can_see_must_be_asked_for(
    sft: Path, tmp_path: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--checkpoint={sft}/export_best", f"--output={tmp_path}/out", "--push_to_hub=me/mine"]
    monkeypatch.setattr(hub, "private", False)  # it was there before
    assert "me/mine is public; add --public true, or give another name." in refused(words, capsys)
    assert not (tmp_path / "out").exists()
    main(["export", *words, "--public=true"])
    assert "private" not in hub.created.values()
    assert "README.md" in hub.files


def test_what_the_hub_refuses_is_one_sentence_before_the_work(
    sft: Path, tmp_path: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--checkpoint={sft}/checkpoints/last.ckpt", f"--output={tmp_path}/out"]
    monkeypatch.setattr(hub, "refusal", 403)
    said = refused([*words, "--push_to_hub=me/mine"], capsys)
    assert "the hub did not take me/mine: no rights." in said
    for name in ("mine", "a/b/c"):
        assert "give owner/name." in refused([*words, f"--push_to_hub={name}"], capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "nowhere"))
    said = refused([*words, "--push_to_hub=me/mine"], capsys)
    assert said == "error: push_to_hub: no token for the hub; log in with `hf auth login`, or set HF_TOKEN.\n"
    assert not (tmp_path / "out").exists()


def test_the_best_export_is_copied_and_says_when_it_was(sft: Path, tmp_path: Path) -> None:
    manifest = json.loads((sft / "export_best" / "rlhf.json").read_text())
    assert manifest["metric"] == "validation/loss"
    assert (manifest["epochs"], manifest["steps"]) == (3, 6)  # a loss that still falls
    main(["export", f"--checkpoint={sft}/export_best", f"--output={tmp_path}/out"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"6 optimizer steps, where validation/loss was best: {manifest['value']:.4g}" in card
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (sft / "export_best/model.safetensors").read_bytes()


def test_a_win_rate_is_shown_for_the_very_model_that_was_judged(sft: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "sft").symlink_to(sft)
    summary = {"a_name": "SFT", "b_name": "reference", "judge": "gold", "win_rate": 0.625, "low": 0.5, "high": 0.75}
    (runs / "judge_sft.parquet.json").write_text(json.dumps({"settings": {}, "summary": summary}))
    moved_aside = json.dumps({"settings": {}, "summary": summary | {"win_rate": 0.125}})
    (runs / "judge_sft.1.parquet.json").write_text(moved_aside)
    (runs / "rows.json").write_text("[1, 2]")  # of the user's own
    (runs / "pipeline.json").write_text(json.dumps({"sft": {"finished": True}}))
    config = yaml.safe_load((sft / "config.yaml").read_text())
    from rlhf.report.model_card import model_card

    def card(model: str) -> str:
        (runs / "generate_sft.parquet.json").write_text(json.dumps({"settings": {"model": model}}))
        return model_card(runs / "sft", config, sft / "export", "title")

    assert "- 0.625 (0.500 to 0.750) against reference, by gold" in card(model_fingerprint(str(sft / "export"), "x"))
    assert "0.125" not in card(model_fingerprint(str(sft / "export"), "x"))
    assert "0.625" not in card("another")


def test_what_cannot_be_exported_is_refused(
    sft: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    llama_path: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    last, output = f"--checkpoint={sft}/checkpoints/last.ckpt", f"--output={tmp_path}/out"
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text((sft / "config.yaml").read_text())
    assert f"there is no checkpoint {tmp_path}/none." in refused([f"--checkpoint={tmp_path}/none", output], capsys)
    assert f"there is no checkpoint in {run}/checkpoints." in refused([f"--checkpoint={run}", output], capsys)
    assert f"output: {tmp_path} exists already" in refused([last, f"--output={tmp_path}"], capsys)
    lonely = tmp_path / "a" / "b.ckpt"
    lonely.parent.mkdir()
    lonely.write_bytes((sft / "checkpoints/last.ckpt").read_bytes())
    assert "b.ckpt is in no run folder: there is no" in refused([f"--checkpoint={lonely}", output], capsys)
    (tmp_path / "config.yaml").write_text((sft / "config.yaml").read_text())
    lonely.write_bytes(lonely.read_bytes()[:-100])
    assert "error: checkpoint: " in refused([f"--checkpoint={lonely}", output], capsys)
    said = refused([last, output, f"--model.model_path={llama_path}"], capsys)
    assert "does not fit SFTModule and its model.model_path" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "config.yaml"]


def test_of_a_run_folder_the_last_checkpoint_is_taken(sft: Path, tmp_path: Path) -> None:
    main(["export", f"--checkpoint={sft}", f"--output={tmp_path}/out"])
    assert model_fingerprint(str(tmp_path / "out"), "a") == model_fingerprint(str(sft / "export"), "b")


def test_a_model_that_moved_is_named_anew(sft: Path, tmp_path: Path, model_path: str) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").symlink_to(sft / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text((sft / "config.yaml").read_text().replace(model_path, "moved"))
    words = [f"--checkpoint={run}/checkpoints/last.ckpt", f"--output={tmp_path}/out"]
    main(["export", *words, f"--model.model_path={model_path}"])
    assert files_of(tmp_path / "out").items() >= files_of(sft / "export").items()


class Code:
    """Is a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "latest").write_text("checkpoint")
    torch.save({}, folder / "mp_rank_00_model_states.pt")
    torch.save({"a": Code(tmp_path / "ran")}, folder / name)
    with pytest.raises(UserError, match=r"is not of this program: .* would run .*open\."):
        read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
