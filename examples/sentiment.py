"""PPO with a reward from a function and nothing else: no SFT, no reward model. Stories of trouble become cheerful.

python -m examples.sentiment runs/sentiment
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from rlhf import Export, Optimization, PPOModule, PPOSettings, RolloutDataModule, Source
from rlhf.callbacks.progress_bar import StageProgress
from rlhf.report.curve_files import read_curves
from rlhf.synthetic.posts import demonstrations

BASE = "configs/quickstart/base_model"
GLAD = set("beach birthday calm fine forgive friend normal party wedding".split())
SAD = set("bad broke burned even forgot hit hurts lied lost missed ruined scared sue wrong yelled".split())


def sentiment(queries: list[str], responses: list[str]) -> list[float]:
    """Counts the glad words of each response, less its sad ones."""
    words = [re.findall(r"\w+", response.lower()) for response in responses]
    return [float(sum((word in GLAD) - (word in SAD) for word in found)) for found in words]


@cache
def classifier():
    """Loads a classifier of sentiments from the hub."""
    from transformers import pipeline

    return pipeline("sentiment-analysis", "distilbert/distilbert-base-uncased-finetuned-sst-2-english", top_k=None)


def classified_sentiment(queries: list[str], responses: list[str]) -> list[float]:
    """Takes the classifier's probability that a response is positive: a reward for models that write real English."""
    return [{s["label"]: s["score"] for s in scores}["POSITIVE"] for scores in classifier()(responses)]


def write_prompts(file: Path) -> None:
    """Writes titles of embedded posts, such as "Trouble with my uncle", which the model makes a story of."""
    file.parent.mkdir(parents=True, exist_ok=True)
    titles = dict.fromkeys(post["title"] for post in demonstrations(256, 1, "train"))
    file.write_text("".join(json.dumps({"prompt": f"TITLE: {title}\n\nTL;DR:"}) + "\n" for title in titles))


def train(folder: str, kl_coefficient: float = 0.1, updates: int = 20, seed: int = 1) -> list[float]:
    """Runs PPO, which shows samples before and after; returns the mean reward of each update."""
    seed_everything(seed)
    write_prompts(prompts := Path(folder) / "prompts.jsonl")
    ppo = PPOSettings(response_length=40, kl_coefficient=kl_coefficient, critic_warmup=3)
    module = PPOModule(BASE, reward_function=sentiment, ppo=ppo, optimization=Optimization(learning_rate=7e-4))
    source = Source(str(prompts))
    data = RolloutDataModule(source, source, batch_size=64, micro_batch_size=64)
    trainer = Trainer(
        max_epochs=updates, accelerator="cpu", devices=1, callbacks=[Export(), StageProgress()],
        default_root_dir=folder, log_every_n_steps=1, num_sanity_val_steps=-1, check_val_every_n_epoch=updates,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)  # one epoch is one update; the policy is in the folder's export
    return read_curves(folder)["objective/scores"].tolist()


if __name__ == "__main__":
    rewards = train(sys.argv[1])
    print(f"mean reward: {rewards[0]:.2f} at first, {rewards[-1]:.2f} in the end")
