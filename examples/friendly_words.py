"""PPO with a reward from a function and nothing else: no SFT, no reward model. The policy learns to use friendly words.

python -m examples.friendly_words runs/friendly

The same from the command line, with prompts of your own:

rlhf pipeline --config custom --model configs/quickstart/base_model --prompts my/prompts.jsonl \
    --reward_function examples.friendly_words.share_of_friendly_words --sft false --response_length 12
"""

import json
import re
import sys
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from rlhf import Export, Optimization, PPOModule, PPOSettings, RolloutDataModule, Source
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import demonstrations

BASE = Path(__file__).parent.parent / "configs" / "quickstart" / "base_model"
FRIENDLY = {"home", "friend", "calm", "forgive", "right", "well", "fine", "please", "sorry", "like"}


def share_of_friendly_words(queries: list[str], responses: list[str]) -> list[float]:
    """Returns the share of the words of each response that are friendly."""
    words = [re.findall(r"\w+", response.lower()) for response in responses]
    return [sum(word in FRIENDLY for word in found) / max(len(found), 1) for found in words]


def train(folder: str, updates: int = 12, kl_coefficient: float = 0.01) -> list[float]:
    """Trains on embedded prompts; returns the mean reward of each update. The policy is in `export` in the folder."""
    seed_everything(1)
    prompts = Path(folder) / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps(record) + "\n" for record in demonstrations(128, 1, "train")))
    module = PPOModule(
        str(BASE),
        reward_function=share_of_friendly_words,
        ppo=PPOSettings(response_length=12, kl_coefficient=kl_coefficient, missing_eos_score=None),
        optimization=Optimization(learning_rate=2e-3),
    )
    data = RolloutDataModule(Source(str(prompts)), batch_size=64, micro_batch_size=64, rollout_batch_size=64)
    trainer = Trainer(
        max_epochs=updates, accelerator="cpu", devices=1, callbacks=[Export()], default_root_dir=folder,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)  # one epoch is one update of PPO
    return read_curves(Path(folder))["objective/scores"].tolist()


if __name__ == "__main__":
    rewards = train(*sys.argv[1:])
    print(f"mean reward: {rewards[0]:.2f} at first, {rewards[-1]:.2f} in the end")
