"""A reward model that reads the token ids of another tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from rlhf.models.loading import check_context
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import retokenise
from rlhf.ops.sequences import pad_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TranslatedModel(nn.Module):
    """Scores sequences of a policy whose tokenizer the reward model does not share: decoded, and tokenised anew.

    Args:
        model: the reward model.
        source: the tokenizer of the sequences.
        target: the tokenizer of the reward model.
    """

    def __init__(self, model: ScalarModel, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self._tokenizers = source, target

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Computes the reward of each sequence, as `ScalarModel.score` does."""
        return self.model.score(*self._translated(input_ids, attention_mask))

    def padding_side_difference(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Measures how much rewards depend on the side of the padding, as `ScalarModel` does."""
        return self.model.padding_side_difference(*self._translated(input_ids, attention_mask))

    def _translated(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        source, target = self._tokenizers
        rows = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True)]
        ids, mask = pad_sequences(retokenise(rows, source, target), target.pad_token_id)
        advice = "lower data.text.max_query_length or the response length"
        check_context(self.model.model.config, ids.shape[1], "A text in the tokens of model.reward_path", advice)
        return ids.to(input_ids.device), mask
