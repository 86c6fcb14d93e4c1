"""The report as a user makes it: from tables on disk, through the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from rlhf.callbacks.curves import CurveLogger
from rlhf.cli.main import main
from rlhf.evaluation.tables import read_table, write_table
from rlhf.report.page import cell
from rlhf.report.report import report
from rlhf.report.runs import Baseline, Run

WORDS = ["cat", "dog", "mat", "house", "sat", "ran", "saw", "ate", "red", "big", "on", "in", "the", "a"]
SKILL = {("small", "SFT"): 0.30, ("small", "PPO"): 0.55, ("large", "SFT"): 0.42, ("large", "PPO"): 0.75}
SKILL_SIZES = ("small", "large")
PARAMETERS = {"small": 100_000, "large": 800_000}


def judged(path: Path, win: float, seed: int, rows: int = 120, longer: float = 0.0, invalid: int = 0) -> str:
    """A judged table of a policy that wins so often, more so where it is longer."""
    random = np.random.default_rng(seed)
    reference_tokens = np.random.default_rng(0).integers(12, 30, rows)
    tokens = np.maximum(3, (reference_tokens * np.exp(random.normal(longer, 0.3, rows))).round()).astype(int)
    chance = 1 / (1 + np.exp(-(np.log(win / (1 - win)) + 1.5 * (np.log(tokens / reference_tokens) - longer))))
    a_first = np.where(random.random(rows) < chance, "a", "b")
    b_first = np.where(random.random(rows) < 0.85, a_first, "tie").astype(object)
    b_first[:invalid] = "invalid"
    points = {"a": 1.0, "tie": 0.5, "b": 0.0, "invalid": np.nan}
    outcome = [(points[x] + points[y]) / 2 for x, y in zip(a_first, b_first, strict=True)]
    score = random.normal(0, 1, rows) + np.where(a_first == "a", 1.0, -1.0)
    texts = np.random.default_rng(0)
    b = [" ".join(texts.choice(WORDS, size=n)) for n in reference_tokens]
    a = [" ".join([*text.split()[: int(len(text.split()) * win)], *random.choice(WORDS, size=n)]) for text, n in
         zip(b, tokens // 2, strict=True)]  # fmt: skip
    table = pd.DataFrame({
        "id": [f"q{n}" for n in range(rows)], "query": [f"POST: question {n}\nTL;DR:" for n in range(rows)], "a": a,
        "b": b, "a_name": "policy", "b_name": "reference", "judge": "made up", "a_first": a_first, "b_first": b_first,
        "outcome": outcome, "a_tokens": tokens, "b_tokens": reference_tokens, "a_score": score, "b_score": 0.0,
        "a_gold": score + 3, "b_gold": 3.5, "a_has_eos": random.random(rows) < 0.98,
    })  # fmt: skip
    write_table(table, path)
    return str(path)


def margins(path: Path, skill: float, seed: int) -> str:
    """Margins of a reward model of this skill on 160 posts and 80 news."""
    random = np.random.default_rng(seed)
    margin = random.normal(skill, 1, 240)
    write_table(
        pd.DataFrame({
            "split": ["posts"] * 160 + ["news"] * 80,
            "batch": [f"batch{n % 3}" for n in range(160)] + ["cnndm0"] * 80,
            "confidence": [float(n % 4 + 1) for n in range(160)] + [np.nan] * 80,
            "chosen_policy": "x", "rejected_policy": "y", "margin": margin,
            "gold_margin": np.where(random.random(240) < 0.9, 1.0, -1.0),
        }),
        path,
    )  # fmt: skip
    return str(path)


def curves(folder: Path, values: dict[str, Sequence[float] | dict[int, float]]) -> str:
    """A run folder with curves, of values from step 1 on or by steps."""
    logger = CurveLogger(folder)
    for name, points in values.items():
        for step, value in points.items() if isinstance(points, dict) else enumerate(points, 1):
            logger.log_metrics({name: value}, 100 * step)
    return str(folder)


def ppo_curves(folder: Path, final_kl: float = 9.0, length: float = 24.0, gold: str = "gold_scores") -> str:
    """A run folder of PPO with eight updates and four validations, over-optimised at the end."""
    update = np.arange(8)
    return curves(folder, {
        "objective/kl": final_kl * update / 7, "objective/scores": 0.1 * update, "val/ratio": np.ones(8),
        "val/ratio_max_deviation": np.full(8, 1e-6), "rollout/eos_share": np.full(8, 0.97),
        "rollout/response_length": np.full(8, length), "validation/score": {0: -0.5, 2: 0.5, 5: 0.8, 8: 0.9},
        f"validation/{gold}": {0: 2.5, 2: 3.5, 5: 4.5, 8: 4.25}, "validation/eos": {8: 1.0},
        "validation/length": {8: length},
    })  # fmt: skip


def make_run(folder: Path, size: str = "small", seed: int = 1, fallen: bool = False, checkpoints: bool = True) -> Run:
    """A run with everything."""
    number = 10 * seed + len(size)
    random = np.random.default_rng(number)
    skill = {label: SKILL[size, label] + random.normal(0, 0.02) for label in ("SFT", "PPO")}
    if fallen:
        skill["PPO"] = 0.12
    folder = folder / f"{size}-{seed}"
    updates = {n: judged(folder / f"update{n}.parquet", skill["SFT"] + 0.03 * n, number + n) for n in (2, 4, 8)}
    return Run(
        size=size, parameters=PARAMETERS[size], seed=seed,
        policies={
            "SFT": judged(folder / "sft.parquet", skill["SFT"], number),
            "PPO": judged(folder / "ppo.parquet", skill["PPO"], number + 1, longer=0.2, invalid=2),
        },
        margins=margins(folder / "margins.parquet", 0.6 if size == "small" else 1.2, number),
        stages={
            "sft": curves(folder / "sft", {"loss/sft_step": [3, 2, 1.5], "validation/rougeL": [0.2, 0.3]}),
            "reward": curves(folder / "reward", {"loss/reward_step": [0.7, 0.5], "validation/accuracy": [0.6, 0.7]}),
            "ppo": ppo_curves(folder / "ppo", 40.0 if fallen else 9.0 + seed, 50.0 if fallen else 24.0),
        },
        checkpoints=updates if checkpoints else {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two sizes with three seeds, of which one collapsed, through the command line."""
    folder = tmp_path_factory.mktemp("study")
    runs = [
        make_run(folder, size, seed, fallen=(size, seed) == ("large", 3)) for size in SKILL_SIZES for seed in (1, 2, 3)
    ]
    words = [f"--runs={json.dumps([asdict(run) for run in runs])}", f"--output={folder}/out"]
    stars = [asdict(Baseline("GPT-x", 400_000, 0.66)), asdict(Baseline("paper", 800_000, 0.7))]
    main(["report", *words, f"--baselines={json.dumps(stars)}", "--samples=2"])
    return folder / "out"


def test_every_number_in_markdown_stands_in_its_file(study: Path) -> None:
    """Of every table, the texts are the numbers of the CSV below it, rounded."""
    blocks = (study / "report.md").read_text().split("\n\n")
    seen = 0
    for table, link in pairwise(blocks):
        name = re.search(r"\((report/\w+\.csv)\)", link)
        if table.startswith("| ") and name:
            frame = pd.read_csv(study / name[1])
            lines = [re.split(r"(?<!\\)\|", line.strip("|")) for line in table.splitlines()]
            heads = [head.strip().replace("\\|", "|") for head in lines[0]]
            assert len(lines) - 2 == len(frame), name[1]
            numbers = [head for head in heads if head.replace(" ", "_") in frame and head != "value"]
            for head in numbers:
                shown = [line[heads.index(head)].strip() for line in lines[2:]]
                assert shown == [cell(value) for value in frame[head.replace(" ", "_")]], (name[1], head)
            if "95% interval" in heads:
                shown = [line[heads.index("95% interval")].strip() for line in lines[2:]]
                ends = zip(frame["low"], frame["high"], strict=True)
                assert shown == ["" if low != low else f"{low:.3f} to {high:.3f}" for low, high in ends], name[1]
            seen += 1
    assert seen == 2  # no wall of tables


def test_everything_that_the_pages_link_to_is_there(study: Path) -> None:
    linked = set(re.findall(r"\]\((\S+?)\)", (study / "report.md").read_text()))
    assert linked >= {"report.html", "report/win_rate_by_size.png", "report/over_optimisation.png"}
    linked |= set(re.findall(r'href="(report/\S+?)"', (study / "report.html").read_text()))
    linked |= {f"report/{stage}_curves.csv" for stage in ("sft", "reward", "ppo")}
    assert linked == {"report.html"} | {f"report/{file.name}" for file in (study / "report").iterdir()} - {
        "report/files.json"
    }
    assert {file.name for file in study.iterdir()} == {"report.html", "report.md", "report", "summary.json"}
    for name in (name for name in linked if name.endswith(".png")):
        picture = Image.open(study / name).convert("L")
        assert min(picture.size) > 300
        assert np.std(picture) > 5  # something is drawn


def test_the_tables_are_those_of_their_functions(study: Path) -> None:
    judged_table = read_table(study.parent / "large-1" / "ppo.parquet", "PPO")
    rates = pd.read_csv(study / "report" / "win_rates.csv").set_index(["size", "seed", "policy"])
    row = rates.loc[("large", 1, "PPO")]
    assert row["win_rate"] == pytest.approx(judged_table["outcome"].mean())
    assert (row["rows"], row["invalid"]) == (120, 2)
    course = pd.read_csv(study / "report" / "over_optimisation.csv").set_index(["size", "seed", "update"])
    assert course.loc[("small", 2, 0), "win_rate"] == rates.loc[("small", 2, "SFT"), "win_rate"]
    assert course.loc[("small", 2, 4), "kl"] == pytest.approx(11 * 4 / 7)
    bins = pd.read_csv(study / "report" / "length_bins.csv")
    assert bins["rows"].sum() == 6 * 120 + 6 * 118


def test_the_claims_and_the_seeds(study: Path) -> None:
    verdicts = pd.read_csv(study / "report" / "claims.csv").set_index("claim")["verdict"]
    assert verdicts["PPO beats SFT against the reference at size small"] == "holds"
    assert verdicts["ROUGE-L of SFT rises with size"] == "holds"
    assert verdicts["ROUGE-L of PPO rises with size"] == "does not hold"  # one large run collapsed
    assert verdicts["Reward-model accuracy on posts rises with size (labels clean (gold score))"] == "holds"
    assert verdicts["Seeds of PPO at size small agree on what wins beyond chance"] == "undecided"  # made independent
    seeds = pd.read_csv(study / "report" / "seeds.csv").set_index(["size", "seed", "policy"])
    assert seeds.loc[("large", 3, "PPO"), ["KL", "length"]].tolist() == pytest.approx([40 * 6.5 / 7, 50])
    assert seeds.loc[("large", 2, "PPO"), ["KL", "length"]].tolist() == pytest.approx([11 * 6.5 / 7, 24])
    text = (study / "report.md").read_text()
    assert "One seed" not in text
    assert text.count("- **reference**:") == 2


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one run without parameters, as a pipeline ends with."""
    folder = tmp_path_factory.mktemp("single")
    report(str(folder / "out"), [replace(make_run(folder, checkpoints=False), parameters=None)])
    return folder / "out"


def test_one_run_shows_what_a_pipeline_gave(single: Path) -> None:
    text, page = (single / "report.md").read_text(), (single / "report.html").read_text()
    for heading in ("SFT, PPO and the reference", "Supervised fine-tuning", "Reward model", "PPO", "Samples", "Claims"):
        assert f"<h2>{heading}</h2>" in page
    assert re.findall("^## (.*)", text, re.MULTILINE) == [
        "SFT, PPO and the reference", "Claims", "Over-optimisation", "Samples"
    ]  # fmt: skip
    assert re.search(r"PPO moved the mean score by \+0\.\d\d standard deviations of the SFT scores, and the gold", text)
    assert "clean (gold score)" in page
    assert text.count("- **reference**:") == 5
    summary = pd.read_csv(single / "report" / "summary.csv").set_index("policy")
    assert list(summary.index) == ["SFT", "PPO", "reference"]
    table = read_table(single.parent / "small-1" / "ppo.parquet", "PPO")
    assert summary.loc["PPO", ["score", "gold", "length"]].tolist() == pytest.approx(
        table[["a_score", "a_gold", "a_tokens"]].mean().tolist()
    )
    assert summary.loc["reference", "gold"] == 3.5
    invariants = pd.read_csv(single / "report" / "invariants.csv").iloc[0]
    assert invariants[["last KL", "highest KL"]].tolist() == [10, 10]
    assert invariants["largest |ratio - 1| before the first step"] == pytest.approx(1e-6)


def test_one_run_is_silent_about_sizes_and_seeds(single: Path) -> None:
    text = (single / "report.md").read_text()
    for words in ("only", "nothing", "## Seeds", "seeds together", "against size"):
        assert words not in text.partition("## Samples")[0]
    blocks = text.split("\n\n")
    assert not [x for x, y in pairwise(blocks) if x.startswith("## ") and y.startswith("## ")]  # no empty section
    assert not [file for file in (single / "report").iterdir() if "seed" in file.name or "by_size" in file.name]


def test_the_course_of_one_run_is_that_of_its_validations(single: Path) -> None:
    """KL after an update is what the next one begins with."""
    course = pd.read_csv(single / "report" / "over_optimisation.csv").set_index("update")
    assert course.index.tolist() == [0, 2, 5, 8]
    assert course["episodes"].tolist() == [0, 200, 500, 800]
    assert course["score"].tolist() == pytest.approx([-0.5, 0.5, 0.8, 0.9])
    assert course["gold_scores"].tolist() == pytest.approx([2.5, 3.5, 4.5, 4.25])
    assert course["kl"].tolist() == pytest.approx([0, 20 / 7, 50 / 7, 10])
    assert course["sqrt_kl"].tolist() == pytest.approx(course["kl"] ** 0.5)
    best = pd.read_csv(single / "report" / "over_optimisation_best.csv").set_index("measure")
    assert best["best_update"].to_dict() == {"score": 8, "gold_scores": 5}
    assert best.loc["gold_scores", ["best", "last"]].tolist() == [4.5, 4.25]
    width, height = Image.open(single / "report" / "over_optimisation.png").size
    assert 0.3 < height / width < 0.5  # two measures beside each other


def test_the_course_takes_the_score_of_any_evaluation_function(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoints=False)
    found = report(str(tmp_path / "out"), [replace(run, stages={"ppo": ppo_curves(tmp_path / "x", gold="my_score")})])
    assert found["over_optimisation"]["my_score"].tolist() == [2.5, 3.5, 4.5, 4.25]
    assert found["over_optimisation_best"]["measure"].tolist() == ["score", "my_score"]


def test_a_course_without_a_validation_before_ppo_has_no_start(tmp_path: Path) -> None:
    points = {"validation/score": {2: 1.0}, "validation/gold_scores": {2: 2.0}}
    folder = curves(tmp_path / "late", {"objective/kl": [0, 1], **points})
    run = replace(make_run(tmp_path, checkpoints=False), stages={"ppo": folder})
    assert report(str(tmp_path / "out"), [run])["over_optimisation"]["update"].tolist() == [2]
    assert "the point at 0" not in (tmp_path / "out" / "report.md").read_text()


def test_a_proxy_alone_has_no_course_of_over_optimisation(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoints=False)
    folder = curves(tmp_path / "proxy", {"objective/kl": [0, 1], "validation/score": [0, 1], "validation/eos": [1, 1]})
    found = report(str(tmp_path / "out"), [replace(run, stages={"ppo": folder})])
    assert "over_optimisation" not in found
    assert "Over-optimisation" not in (tmp_path / "out" / "report.md").read_text()


def test_the_least_that_a_report_can_be_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One policy, judged, and nothing else: no scores, no lengths in tokens, no folders, invalid rows only."""
    table = pd.DataFrame({"query": ["q0", "q1"], "a": ["x", ""], "b": ["x y", "z"], "a_first": "invalid",
                          "b_first": "a", "outcome": np.nan})  # fmt: skip
    write_table(table, tmp_path / "judged.csv")
    found = report(str(tmp_path / "out"), [Run("s", None, 1, {"mine": str(tmp_path / "judged.csv")})])
    assert found["win_rates"][["rows", "invalid"]].iloc[0].tolist() == [2, 2]
    text = (tmp_path / "out" / "report.html").read_text()
    for sentence in (
        "The judged tables have no lengths in tokens; <code>lengths: characters</code> needs no token counts.",
        "For accuracy and calibration give the table of the command <code>margins</code> as <code>margins</code>.",
        "For scores in the judged tables give the command <code>generate</code> a <code>reward</code>.",
    ):
        assert sentence in text
    assert re.findall("<h2>([^$<]*)</h2>", text) == [
        "mine and the reference", "Win rate against the reference", "Win rate and length", "Reward model", "ROUGE",
        "Samples",
        "How it was made",
    ]  # fmt: skip
    assert "mine" in capsys.readouterr().out


def test_lengths_in_characters_leave_out_empty_responses(tmp_path: Path) -> None:
    path = Path(judged(tmp_path / "judged.csv", 0.5, 1))
    table = read_table(path, "PPO")
    write_table(table.assign(a=["", *table["a"][1:]]).drop(columns=["a_tokens", "b_tokens"]), path)
    found = report(str(tmp_path / "out"), [Run("s", None, 1, {"PPO": str(path)})], lengths="characters")
    assert len(found["left_out"]) == 1
    assert found["length_adjusted"]["rows"].tolist() == [119]
    assert "Left out: 1 rows in which a text is empty" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "more", "sentence"),
    [
        ({"policies": {"PPO": "nowhere.parquet"}}, [], "PPO of size small, seed 1: there is no table nowhere.parquet"),
        ({"margins": "nowhere.csv"}, [], "margins of size small, seed 1: there is no table nowhere.csv"),
        ({"stages": {"ppo": "nowhere"}}, [], "nowhere is not a finished run: it has no file curves.jsonl"),
        ({"checkpoints": {9: "ppo"}}, [], "there is a checkpoint of update 9, but PPO made only 8 updates"),
        ({"checkpoints": {2: "ppo"}, "stages": {}}, [], "has checkpoints, but no curve objective/kl"),
        ({"parameters": None}, ['--baselines=[{"name": "x", "parameters": 5, "win_rate": 0.6}]'], "baselines: they"),
        ({}, ["--samples=-1"], "samples"),
        ({}, ["--lengths=words"], "lengths"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    changes: dict[str, object], more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = judged(tmp_path / "ppo.parquet", 0.5, 1, rows=4)
    run = asdict(Run("small", 10, 1, {"PPO": path}, stages={"ppo": ppo_curves(tmp_path / "ppo")})) | changes
    run["checkpoints"] = {update: path for update in run["checkpoints"]}
    with pytest.raises(SystemExit) as stop:
        main(["report", f"--runs={json.dumps([run])}", f"--output={tmp_path}/out", *more])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_config_of_a_report(tmp_path: Path) -> None:
    path = judged(tmp_path / "ppo.parquet", 0.5, 1, rows=30)
    config = tmp_path / "report.yaml"
    config.write_text(
        f"output: {tmp_path}/out\nlengths: characters\nsamples: 0\n"
        f"runs:\n- {{size: 1b, parameters: 1000000000, seed: 1, policies: {{SFT: {path}, PPO: {path}}}}}\n"
        "baselines:\n- {name: GPT, parameters: 2000000000, win_rate: 0.6}\n"
    )
    main(["report", f"--config={config}"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Lengths in characters." in (tmp_path / "out" / "report.html").read_text()
    assert "## Samples" not in text
    assert 'id="samples"' not in (tmp_path / "out" / "report.html").read_text()
    differences = pd.read_csv(tmp_path / "out" / "report" / "differences.csv")
    assert differences[["difference", "low", "high"]].iloc[0].tolist() == [0, 0, 0]  # a policy against itself


def test_the_config_in_the_docs_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    config = tmp_path / "report.yaml"
    config.write_text(re.search(r"```yaml\n(# report.yaml\n.*?)```", text, re.DOTALL)[1])
    with pytest.raises(SystemExit) as stop:
        main(["report", f"--config={config}", "--print_config"])
    assert stop.value.code in (0, None)
    [run] = yaml.safe_load(capsys.readouterr().out)["runs"]
    assert list(run["policies"]) == ["SFT", "PPO"]
    assert list(run["checkpoints"]) == [50, 100]
