"""What a report is made of: runs of a pipeline, and baselines to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """One run of SFT, reward model and PPO.

    Attributes:
        size: name of the model's size.
        parameters: of the policy; None is allowed where there is one size only.
        seed: of the run.
        policies: label -> judged table of that policy (A) against the reference (B).
        margins: table of the reward model's margins.
        stages: `sft`, `reward`, `ppo` -> run folder, for curves.
        checkpoints: number of PPO updates -> judged table of the policy after that update.
    """

    size: str
    parameters: int | None
    seed: int
    policies: dict[str, str]
    margins: str | None = None
    stages: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """Somebody else's result: a star in the main figure."""

    name: str
    parameters: int
    win_rate: float
