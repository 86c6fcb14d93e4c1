"""A PPOModule with a reward of its own: the reward model's, less a price per word."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf import PPOModule, Rollout


class ShortAnswersPPO(PPOModule):
    """Prefers short responses.

    Args:
        price: what a word costs.
        args, kwargs: of `PPOModule`.
    """

    def __init__(self, *args, price: float = 0.1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.price = price

    def score_responses(self, episodes: Rollout) -> Tensor:
        """Computes the reward of every episode, `(N,)`."""
        words = [len(text["response"].split()) for text in episodes.texts]
        return super().score_responses(episodes) - self.price * torch.tensor(words, device=self.device)


def number_of_words(queries: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """Returns minus the number of words; a plain function for `model.reward_function`."""
    return [-float(len(response.split())) for response in responses]
