"""The model card of an export: how the model was trained, by what its run and the pipeline around it wrote."""

import json
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rlhf import files
from rlhf.errors import UserError
from rlhf.models.adapter_files import CONFIG_FILE, adapter_settings
from rlhf.models.loading import is_classifier, load_config, model_fingerprint
from rlhf.report.curve_files import read_curves

CARD = "README.md"
WHAT = {
    "sft": "A language model after supervised fine-tuning.",
    "reward": "A reward model with one label: the reward is its score less `reward_shift` of `{}`.",
    "dpo": "A language model after direct preference optimisation (DPO).",
    "ppo": "A language model after reinforcement learning from human feedback{}.",
}
NO_RESULTS = (
    "seconds/*", "memory/*", "tokens_per_second/*", "invariants/*", f"{files.TOTAL}*", "eps", "epoch", "lr", "*_step",
)  # fmt: skip
OF_THE_TRAINER = ("max_epochs", "precision", "strategy", "devices", "num_nodes", "gradient_clip_val")
LIBRARIES = ("torch", "transformers", "lightning")
PAPER = "[The N+ Implementation Details of RLHF with PPO](https://arxiv.org/abs/2403.17031)"


def model_card(run: Path, config: dict[str, Any], export: Path, title: str) -> str:
    """Makes the card of an export.

    Args:
        run: folder of the run, for its curves, and for tables of its pipeline beside it.
        config: that of the run.
        export: folder of the export.
        title: heading of the card.
    """
    from huggingface_hub import ModelCardData

    manifest = json.loads((export / files.MANIFEST).read_text())
    classifier, settings = is_classifier(load_config(str(export), "output")), config["model"]["init_args"]
    kind = "reward" if classifier else next((kind for kind in ("ppo", "dpo") if kind in settings), "sft")
    ppo = kind == "ppo"
    history = _history(config)
    adapter = adapter_settings(str(export))
    base = history[0][1] if adapter is None else adapter["base_model_name_or_path"]
    header = ModelCardData(
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="text-classification" if classifier else "text-generation",
        base_model=base if _is_on_hub(base) else None,
        tags=["rlhf", kind],
    )
    moment = f"after {manifest['epochs']} {'updates' if ppo else 'epochs'}, {manifest['steps']} optimizer steps"
    if "metric" in manifest:
        moment += f", where {manifest['metric']} was best: {manifest['value']:.4g}"
    critic = " with PPO. Its critic is in `critic`" if (export / "critic").is_dir() else ""
    what = WHAT[kind].format(critic if ppo else "config.json" if adapter is None else CONFIG_FILE)
    if adapter is not None:
        what += f" It is an adapter, to be loaded on the base that it was trained on, `{_shown(base)}`."
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    sections = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {title}\n",
        f"{what} Exported {moment}, by rlhf {manifest['version']}, which reproduces {PAPER}; with {versions}.\n",
        "## Training\n",
        *(f"{number}. {what}: `{_shown(path)}`" for number, (what, path) in enumerate(history, 1)),
        f"\n```yaml\n{yaml.safe_dump(settings_that_matter(config), sort_keys=False)}```\n",
        *_results(run, export, kind),
    ]
    return "\n".join(sections)


def _history(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Lists the base model, and the class of every stage from there with its training data."""
    arguments = config["model"]["init_args"]
    found: list[tuple[str, str]] = []
    for path in filter(None, (arguments.get("model_path"), arguments.get("reward_path"))):
        before = Path(path).parent / files.CONFIG
        found += _history(yaml.safe_load(before.read_text())) if before.is_file() else [("Base model", path)]
    stage = config["model"]["class_path"].rpartition(".")[2]
    return [*dict.fromkeys([*found, (f"{stage}, trained on", config["data"]["init_args"]["train"]["path"])])]


def _is_on_hub(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "~", "/")) and not Path(path).exists()


def _shown(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path  # no names of folders of a machine


def settings_that_matter(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of module, data and Trainer that are set, without paths."""
    trainer = {name: config.get("trainer", {}).get(name) for name in OF_THE_TRAINER}
    parts = {**{part: config.get(part, {}).get("init_args", {}) for part in ("model", "data")}, "trainer": trainer}
    return {"seed_everything": config.get("seed_everything"), **_without_paths(parts)}


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _without_paths(x) if isinstance(x, dict) else x for key, x in settings.items()}
    return {key: x for key, x in kept.items() if x not in (None, {}) and not key.endswith("path")}


def _results(run: Path, export: Path, kind: str) -> list[str]:
    """Makes the section of win rates, if the pipeline judged this very model, and that of the curves' last values."""
    sections = []
    generated, judged = (run.parent / f"{verb}_{kind}.parquet{files.NOTES}" for verb in ("generate", "judge"))
    if generated.is_file() and judged.is_file():
        model, result = (
            json.loads(generated.read_text())["settings"]["model"],
            json.loads(judged.read_text())["summary"],
        )
        if model == model_fingerprint(str(export), "output"):
            row = "- {win_rate:.3f} ({low:.3f} to {high:.3f}) against {b_name}, by {judge}".format(**result)
            sections += ["## Win rate, with its 95% interval\n", row, ""]
    try:
        curves = read_curves(run)
    except UserError:  # the run wrote none
        return sections
    shown = {name: c for name, c in curves.items() if not any(fnmatchcase(name, pattern) for pattern in NO_RESULTS)}
    rows = [f"| {name} | {c.iloc[-1]:.4g} | {c.index[-1]} |" for name, c in sorted(shown.items())]
    return [*sections, "## Last value of each curve of the run\n", "| curve | value | step |\n|---|---|---|", *rows, ""]
