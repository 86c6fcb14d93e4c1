from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.models.learning_rates import is_usual, proposed_learning_rate

CONFIGS = Path(__file__).parents[2] / "configs"
PYTHIA = {"1b": 1_000_000_000, "2.8b": 2_800_000_000, "6.9b": 6_900_000_000}


def test_the_anchors_and_what_lies_between() -> None:
    assert [proposed_learning_rate(n) for n in PYTHIA.values()] == [3e-6] * 3  # the paper's
    assert proposed_learning_rate(250_000) == pytest.approx(5e-4, rel=0.05)  # the quickstart's
    sizes = [10**n for n in range(4, 12)]
    assert [proposed_learning_rate(n) for n in sizes] == sorted(map(proposed_learning_rate, sizes), reverse=True)


@pytest.mark.parametrize(
    ("learning_rate", "parameters"),
    [
        (1.41e-5, 124_000_000),
        (6.35e-5, 1_300_000_000),
        (9.65e-6, 6_000_000_000),
        (2e-5, 7_000_000_000),
        (3e-6, 7 * 10**7),
    ],
)
def test_what_is_usual(learning_rate: float, parameters: int) -> None:
    assert is_usual(learning_rate, parameters)


@pytest.mark.parametrize(("learning_rate", "parameters"), [(3e-6, 260_000), (1e-3, 124_000_000), (1e-3, 10**9)])
def test_what_is_not(learning_rate: float, parameters: int) -> None:
    assert not is_usual(learning_rate, parameters)


def parameters_of(file: Path) -> list[int]:
    """The sizes of the models that a shipped config trains."""
    if file.parent.name in ("tldr", "lora"):
        return list(PYTHIA.values())
    base = AutoConfig.from_pretrained(CONFIGS / "quickstart" / "base_model")
    widths = [yaml.safe_load(f.read_text())["model"]["hidden_size"] for f in (CONFIGS / "scaling").glob("model_*.yaml")]
    sizes = []
    for width in widths if file.parent.name == "scaling" else [base.hidden_size]:
        base.hidden_size, base.intermediate_size = width, 4 * width
        sizes.append(AutoModelForCausalLM.from_config(base).num_parameters())
    return sizes


def test_those_of_the_shipped_configs_are_usual() -> None:
    seen = 0
    for file in CONFIGS.glob("*/*.yaml"):
        for rate in re.findall(r"learning_rate: ([\d.e-]+)", file.read_text()):
            seen += 1
            adapters = "lora:" in file.read_text()
            assert all(is_usual(float(rate), parameters, adapters) for parameters in parameters_of(file)), file
    assert seen >= 10
