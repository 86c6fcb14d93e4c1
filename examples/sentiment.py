"""PPO with a reward from a function and nothing else: no SFT, no reward model. Stories of trouble become cheerful.

python -m examples.sentiment runs/sentiment

Over five seeds the mean reward rose from -1.08 (-1.17 to -0.95) to 0.83 (0.59 to 0.98) in 16 updates, the KL to 4.6
(4.1 to 5.6) nats per response. A run takes 28 s on one free core of an AMD EPYC. On "My sister moved my stuff":

    before  My sister moved my stuff at me at home and I lost 90 dollars, I need to know who is right.
    after   My sister moved my stuff at the beach, I need to know who is right.

The same from the command line, with the prompts that it wrote, and a report:

rlhf pipeline --config custom --model configs/quickstart/base_model --prompts runs/sentiment/prompts.jsonl \
    --reward_function examples.sentiment.sentiment --response_length 40 --learning_rate 7e-4 --validation 0.1 \
    --ppo.trainer.max_epochs 16 --ppo.model.ppo.kl_coefficient 0.1 --ppo.model.ppo.critic_warmup 2 \
    --ppo.model.ppo.missing_eos_score=-4 --ppo.model.optimization.schedule cosine --seed 1
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

GLAD = {"beach", "birthday", "calm", "fine", "forgive", "friend", "normal", "party", "wedding"}
SAD = {"broke", "burned", "forgot", "hit", "hurts", "lied", "lost", "missed", "ruined", "scared", "wrong", "yelled"}


def sentiment(queries: list[str], responses: list[str]) -> list[float]:
    """Counts the glad words of each response, less its sad ones."""
    words = [re.findall(r"\w+", response.lower()) for response in responses]
    return [float(sum((word in GLAD) - (word in SAD) for word in found)) for found in words]


@cache
def classifier():
    """Loads a sentiment classifier from the hub."""
    from transformers import pipeline

    return pipeline("sentiment-analysis", "distilbert/distilbert-base-uncased-finetuned-sst-2-english", top_k=None)


def classified_sentiment(queries: list[str], responses: list[str]) -> list[float]:
    """Takes its probability that a response is positive: the reward for a model that writes real English."""
    return [{found["label"]: found["score"] for found in labels}["POSITIVE"] for labels in classifier()(responses)]


def train(folder: str, kl_coefficient: float = 0.1, updates: int = 16, seed: int = 1) -> list[float]:
    """Runs PPO, which shows samples before and after; returns the mean reward of each update."""
    seed_everything(seed)
    titles = dict.fromkeys(post["title"] for post in demonstrations(256, 1, "train"))  # such as Trouble with my uncle
    prompts = Path(folder) / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps({"prompt": f"TITLE: {title}\n\nTL;DR:"}) + "\n" for title in titles))
    # A response that does not end gets less than any that does.
    ppo = PPOSettings(response_length=40, kl_coefficient=kl_coefficient, missing_eos_score=-4.0, critic_warmup=2)
    settings = {"ppo": ppo, "optimization": Optimization(learning_rate=7e-4)}
    module = PPOModule("configs/quickstart/base_model", reward_function=sentiment, **settings)
    validation, training = Source(str(prompts), part=(0.0, 0.1)), Source(str(prompts), part=(0.1, 1.0))
    data = RolloutDataModule(training, validation, batch_size=64, micro_batch_size=64)
    trainer = Trainer(
        max_epochs=updates, accelerator="cpu", devices=1, callbacks=[Export(), StageProgress()],
        default_root_dir=folder, log_every_n_steps=1, num_sanity_val_steps=-1, check_val_every_n_epoch=updates,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)  # one epoch is one update; the policy is in the folder's export
    return read_curves(folder)["objective/scores"].tolist()


if __name__ == "__main__":
    rewards = train(sys.argv[1])
    print(f"mean reward: {rewards[0]:.2f} at first, {rewards[-1]:.2f} in the end")
