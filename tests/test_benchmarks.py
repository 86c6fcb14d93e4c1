"""The benchmark of throughput: its fixtures, what it counts, and both sides on a model that takes seconds."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
HAS_TRL = importlib.util.find_spec("trl") is not None
HAS_PPO = HAS_TRL and tuple(map(int, importlib.metadata.version("trl").split(".")[:2])) <= (1, 12)
needs_ppo = pytest.mark.skipif(not HAS_PPO, reason="needs pip install 'rlhf[bench]' (trl 1.12)")
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="needs pip install 'rlhf[bench-stages]' (trl)")


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def part(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Any]:
    """Fixtures for 4 episodes of at most 11 tokens, and what to do with them."""

    def make(
        regime: str = "full", lengths: tuple[int, ...] = (20, 30, 30, 40), kind: str = "PPOTask", **settings: Any
    ) -> Any:
        fixtures = part("throughput.fixtures")
        with torch.random.fork_rng(devices=[]):
            fixtures.write(tmp_path, fixtures.SHAPES["test"], regime, list(lengths), settings.get("lora"))
        defaults: dict[str, Any] = {
            "folder": str(tmp_path),
            "batch": 4,
            "updates": 2,
            "micro": 2,
        }
        more = {"response_length": 11} if kind == "PPOTask" else {}
        return getattr(part("throughput.record"), kind)(**(defaults | more | settings))

    return make


def rows_of(side: str, task: Any, *more: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    turns: list[None] = []
    part(f"throughput.{side}").measure(task, lambda: turns.append(None), rows.append, *more)
    assert len(turns) == len(rows) == task.updates
    return rows


# -------------------------------------------------------------------------------------------------------- fixtures


@pytest.mark.parametrize("count", [64, 512])
def test_prompts_are_as_long_as_those_of_tldr(count: int) -> None:
    lengths = part("throughput.fixtures").prompt_lengths(count)
    assert len(lengths) == count
    assert sum(lengths) / count == pytest.approx(289, abs=2)
    assert min(lengths) >= 48
    assert 500 <= max(lengths) <= 512


def test_shapes_have_the_weights_of_the_pythias() -> None:
    """Of all weights but the embedding and the output layer, the Pythia suite states these numbers."""
    published = {"70m": 18_915_328, "160m": 85_056_000, "410m": 302_311_424, "1b": 805_736_448}
    for name, weights in published.items():
        shape = part("throughput.fixtures").SHAPES[name]
        assert shape.layer_weights == pytest.approx(weights, rel=3e-3)  # the rest are biases and norms
    tiny = part("throughput.fixtures").SHAPES["tiny"]
    assert tiny.layer_weights + 2 * tiny.output_weights == pytest.approx(29e6, rel=0.01)


def test_the_prompts_keep_their_length_as_text(task: Callable[..., Any]) -> None:
    from rlhf.models.tokenizers import load_tokenizer

    folder = Path(task().folder)
    tokenizer = load_tokenizer(str(folder / "policy"))
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert [len(row) for row in ids] == [20, 30, 30, 40]
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id}.isdisjoint(token for row in ids for token in row)


@pytest.mark.parametrize(("regime", "end"), [("full", 0.0), ("early", 0.046)])
def test_the_weights_decide_how_long_responses_get(task: Callable[..., Any], regime: str, end: float) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(Path(task(regime).folder) / "policy", dtype=torch.float32)
    ids = torch.randint(1, 485, (64, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        probabilities = torch.softmax(model(ids).logits / 0.7, -1)
    assert probabilities[..., 0].mean().item() == pytest.approx(end, rel=0.05, abs=1e-9)
    assert probabilities[..., 485].max() < 1e-9  # PAD


# ------------------------------------------------------------------------------------------------------- both sides


def check(rows: list[dict[str, Any]], queries: list[int]) -> None:
    phases = part("throughput.record").PHASES
    for row in rows:
        assert sorted(row["queries"]) == queries
        assert row["responses"] == [11] * 4
        assert all(row[phase] > 0 for phase in phases), row
        assert row["rest"] > 0
        assert sum(row[phase] for phase in phases) + row["rest"] == pytest.approx(row["seconds"])
        assert row["peak_rss_gib"] > 0.1


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_our_side(lora: dict[str, int] | None, task: Callable[..., Any], tmp_path: Path) -> None:
    """Queries of 30 tokens, so that nothing is padded.

    Sampling sees each query and the first 10 tokens of its response; policy and critic see episodes in the rollout and
    in 4 epochs, reference and reward model once.
    """
    rows = rows_of("ours", task(lengths=(30,) * 4, lora=lora))
    check(rows, [30] * 4)
    assert (tmp_path / "reward" / "adapter_config.json").exists() == (lora is not None)
    assert rows[1]["processed"] == 4 * 40 + 4 * 41 * (2 + 2 + 2 * 4)


@needs_ppo
def test_trl(task: Callable[..., Any]) -> None:
    """It pads all queries to the longest, and has no pass of the policy over the rollout."""
    rows = rows_of("trl_side", task())
    check(rows, [20, 30, 30, 40])
    assert rows[1]["processed"] == 4 * (40 + 10) + 4 * (40 + 11) * (3 + 2 * 4)
    import trl.experimental.ppo.ppo_trainer as ppo

    assert {ppo.forward.__module__, ppo.batch_generation.__module__} == {ppo.__name__}
    assert not hasattr(ppo.forward, "__wrapped__")  # the clock is off again


def test_responses_that_end_early_are_counted_to_their_end(task: Callable[..., Any]) -> None:
    for side in ("ours", *(("trl_side",) if HAS_PPO else ())):
        lengths = [n for row in rows_of(side, task("early", response_length=40)) for n in row["responses"]]
        assert min(lengths) < 40
        assert max(lengths) <= 40


def test_the_profile_names_operators_and_writes_a_trace(task: Callable[..., Any], capsys: Any, tmp_path: Path) -> None:
    ours = part("throughput.ours")
    threads = torch.get_num_threads()
    ours.profile(replace(task(), ppo_epochs=1), tmp_path / "trace.json")
    assert torch.get_num_threads() == threads
    assert "aten::addmm" in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


# -------------------------------------------------------------------------------------------- SFT and reward model

TOKENS = 20 + 30 + 30 + 40 + sum((12, 25, 38, 52)) + 4  # prompts, responses, EOS


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [({"stage": "sft"}, TOKENS), ({"loss_on": "response"}, TOKENS), ({"stage": "reward"}, 2 * TOKENS)],
)
def test_a_stage_learns_the_same_from_the_same_tokens(
    task: Callable[..., Any], settings: dict[str, Any], tokens: int
) -> None:
    ours = rows_of("stage_ours", task(kind="StageTask", updates=3, learning_rate=1e-3, **settings))
    for row in ours:
        assert min(row[name] for name in ("forward", "backward", "optimizer", "rest")) > 0
        assert row["peak_rss_gib"] > 0.1
    assert [row["real"] for row in ours[1:]] == [row["processed"] for row in ours[1:]] == [tokens] * 2
    losses = [row["loss"] for row in ours]
    assert losses[0] > losses[1] > losses[2]
    if HAS_TRL:
        trl = rows_of("stage_trl", task(kind="StageTask", updates=3, learning_rate=1e-3, **settings))
        assert [row["real"] for row in trl] == [tokens] * 3
        assert all(row["processed"] > tokens for row in trl)  # it pads
        assert [row["loss"] for row in trl] == pytest.approx(losses, rel=1e-4)
        assert all(min(row[name] for name in ("forward", "backward", "optimizer", "rest")) > 0 for row in trl)


@needs_trl
@pytest.mark.parametrize("way", ["padding_free", "packing"])
def test_trl_without_padding(task: Callable[..., Any], way: str) -> None:
    """Its rows do not see one another: the losses are those of padded rows."""
    settings = part("stage_throughput").BATCHES[way]
    padded = rows_of("stage_trl", task(kind="StageTask"))
    rows = rows_of("stage_trl", task(kind="StageTask", trl=settings))
    assert [row["processed"] for row in rows] == [row["real"] for row in rows] == [TOKENS] * 2
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in padded], rel=1e-4)


def test_sides_that_do_different_work_are_refused() -> None:
    agree = part("stage_throughput").agree
    first, row = {"real": 9, "loss": 2.0}, {"real": 5, "loss": 1.0}
    agree([{"ours": [first, row], "trl": [{**first, "real": 5}, {**row, "loss": 1.0005}]}], 1e-3)
    with pytest.raises(SystemExit, match="different numbers of real tokens"):
        agree([{"ours": [first, row], "trl": [first, {**row, "real": 6}]}], 1e-3)
    with pytest.raises(SystemExit, match="different losses"):
        agree([{"ours": [first, row], "trl": [first, {**row, "loss": 1.01}]}], 1e-3)


def test_the_command_for_stages(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    sides = ["ours", "trl"] if HAS_TRL else ["ours"]
    out = run(monkeypatch, capsys, "--stage=reward", "--sides", *sides, command="stage_throughput")
    found = json.loads(out.splitlines()[-1])
    assert list(found["medians"]) == sides
    assert all(len(rows) == 1 for rows in found["updates"].values())
    assert (found["ratio"] is not None) == HAS_TRL
    assert "real tokens/s" in out
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--stage=reward", "--sides=ours", "--trl_batches=packing", command="stage_throughput")
    assert "is for --stage sft" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- figures


def test_what_an_update_needs() -> None:
    """By hand, for d = 32, 2 layers, vocabulary 512, queries of 3 and 5 tokens, responses of 2 and 1."""
    needs, shape = part("throughput.needs"), part("throughput.fixtures").SHAPES["test"]
    queries, responses = [3, 5], [2, 1]
    assert needs.tokens_needed(queries, responses, 4) == 12 * 11
    layers = 12 * 2 * 32 * 32
    forward = 2 * (2 * layers * 11 + 2 * 2 * 32 * (25 + 36)) + 2 * 32 * 512 * 3
    assert needs.training_flops(shape, queries, responses, 4) == 12 * forward
    # two steps read all weights; the second token of the first row reads 4 earlier ones, the first tokens 3 and 5
    assert needs.decoding_bytes(shape, queries, responses, 2) == 2 * (2 * (layers + 32 * 512) + 2 * 2 * 32 * 12)


def test_ratios_are_of_neighbours_and_peaks_are_the_highest() -> None:
    results = part("throughput.results")
    ours = [{"episodes_per_second": x, "peak_rss_gib": p} for x, p in ((4.0, 1.0), (2.0, 3.0), (9.0, 2.0))]
    theirs = [{"episodes_per_second": x, "peak_rss_gib": 1.0} for x in (1.0, 1.0, 3.0)]
    assert results.ratios(ours, theirs) == {"min": 2.0, "median": 3.0, "max": 4.0}
    assert results.medians(ours) == {"episodes_per_second": 4.0, "peak_rss_gib": 3.0}


def test_a_device_at_its_limits() -> None:
    results, needs = part("throughput.results"), part("throughput.needs")
    shape, task = (
        part("throughput.fixtures").SHAPES["test"],
        part("throughput.record").PPOTask("", precision="bf16-mixed"),
    )
    flops = needs.training_flops(shape, [9], [4], 4)
    moved = needs.decoding_bytes(shape, [9], [4], 2)
    row = {"queries": [9], "responses": [4], "sampling": 2.0, "forward": 1.0, "backward": 2.0, "optimizer": 1.0}
    got = results.on_device(row, task, shape, tflops=flops / 4e12, gigabytes=moved / 1e9)
    assert got == pytest.approx({"sampled_per_second": 2.0, "sampling_of_bandwidth": 0.5, "training_mfu": 1.0})


def test_linear_costs_are_recognised() -> None:
    cells = {(q, r): 0.5 + 0.01 * q + 0.1 * r for q in (64, 128, 512) for r in (13, 53)}
    _, fit = part("throughput.results").lengths_table(cells)
    expected = {"per_episode": 0.5, "per_query_token": 0.01, "per_response_token": 0.1, "largest_deviation": 0.0}
    assert fit == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- command line


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: str, command: str = "ppo_throughput") -> str:
    same = ["--shape=test", "--threads=1", "--batch=4", "--micro=2", "--updates=1"]
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *same, *words])
    part(command).main()
    return capsys.readouterr().out


@needs_ppo
def test_the_command_with_both_sides(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """That with our side alone is rehearsed below, by `gpu.py`."""
    check_output(run(monkeypatch, capsys, "--regime=early", "--sides", "ours", "trl"), "early", ["ours", "trl"])


def check_output(out: str, regime: str, sides: list[str]) -> None:
    """What `ppo_throughput.py` has printed."""
    found = json.loads(out.splitlines()[-1])
    assert found["settings"]["ppo_epochs"] == 4
    assert list(found[regime]["medians"]) == sides
    assert all(len(rows) == 1 for rows in found[regime]["updates"].values())
    assert (found[regime]["ratio"] is not None) == (len(sides) == 2)
    assert "episodes/s" in out


def test_a_failing_worker_is_shown(tmp_path: Path) -> None:
    turns, record = part("throughput.turns"), part("throughput.record")
    with pytest.raises(SystemExit, match="No module named"):
        turns.play(record.Task(str(tmp_path)), {"ours": "throughput.no_such_module"}, apart=False, seconds=60)


def test_what_does_not_fit_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--micro=3")
    assert "no multiple of --micro 3" in capsys.readouterr().err


def test_a_task_survives_the_command_line() -> None:
    for kind in ("PPOTask", "StageTask"):
        task = getattr(part("throughput.record"), kind)("folder", data={"micro_batch_size": 2})
        assert type(task)(**json.loads(json.dumps(asdict(task)))) == task


# -------------------------------------------------------------------------------------------------------- a GPU


HIDDEN = """
import importlib.metadata, sys
from_name = importlib.metadata.Distribution.from_name
def known(name):
    if name in ("deepspeed", "trl"):
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)
importlib.metadata.Distribution.from_name = known
sys.modules["deepspeed"] = sys.modules["trl"] = None
"""


def test_parts_for_a_gpu_are_rehearsed_on_a_cpu_without_deepspeed_and_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs neither runs; what needs one of them says so in its row, and what fails shows why."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("deepspeed", "trl"):
        monkeypatch.setitem(sys.modules, name, None)
    gpu = part("gpu")
    parts = gpu.parts()
    assert list(parts) == ["tests", "ppo", "lora", "sampling", "training", "trl", "placements"]
    adapters = parts["lora"][-1]  # of the same command as all of `ppo`
    for case in (parts["sampling"][0], parts["training"][0], adapters, parts["trl"][0], parts["placements"][0]):
        assert gpu.run(case, True, 600.0, tmp_path / case.name), capsys.readouterr().out
    sampling, training, ppo, trl, placements = capsys.readouterr().out.splitlines()
    assert sampling.startswith(f"| {gpu.device_name()} | bf16 | full, ours: ")
    for way in ("full, graph", "full, generate", "early, ours"):
        assert f"{way}: " in sampling
    assert "matrix product" in training
    assert "2 rows, activations kept: " in training
    assert "2 rows, activations again: " in training
    assert "full, ours: " in ppo
    check_output((tmp_path / adapters.name).read_text(), "full", ["ours"])
    assert "not measured: trl is not installed" in trl
    assert "not measured: deepspeed is not installed" in placements
    assert not gpu.run(adapters._replace(rehearsal=["-c", "raise SystemExit('no memory')"]), True, 120.0, None)
    assert "no memory" in capsys.readouterr().out


def test_peaks_of_a_gpu_stand_beside_their_estimate() -> None:
    """The estimate of `docs/memory.md` for the settings of the benchmark."""
    from rlhf.models.memory import Workload, estimate

    gpu, fixtures = part("gpu"), part("throughput.fixtures")
    settings = {"shape": "test", "micro": 16, "data": {"micro_batch_size": 32}, "batch": 512, "precision": "bf16-mixed"}
    run = Workload("ppo", "single", "bf16-mixed", 1, 32, 64, max(fixtures.prompt_lengths(512)), 53)
    phases = estimate(fixtures.config_of(fixtures.SHAPES["test"]), run).values()
    expected = max(phase.total for phase in phases) / 2**30
    assert gpu.estimated_gib(settings | {"response_length": 53}) == expected
    case = {"micro": 32, "recompute": False, "seconds": 0.5, "mfu": 0.4, "peak_gib": 50.0, "estimated_gib": 55.0}
    limits = {"copy_gigabytes_per_second": 3000.0, "product_tflops": 700.0}
    lost = {"micro": 64, "recompute": False, "failure": "out of memory"}
    row = gpu.training_row(json.dumps({"limits": limits, "cases": [case, lost]}))
    assert "32 rows, activations kept: 0.500 s, MFU 40.0% 50.0 GiB (55.0 estimated)" in row
    assert row.endswith("64 rows, activations kept: out of memory")
