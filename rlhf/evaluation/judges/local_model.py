"""A causal language model of one's own as a judge, by the probabilities of two labels."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.checks import at_least
from rlhf.errors import UserError
from rlhf.evaluation.judges.endpoint import check_template
from rlhf.evaluation.judges.kept_answers import AskingJudge, Entry, Question, Verdict

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = """Below are a post and two summaries of it. The better summary tells the points of the post that matter \
most and is true to the post.

### Post
{query}

### Summary A
{first}

### Summary B
{second}

### The better summary
Preferred:"""


class LocalJudge(AskingJudge):
    """A causal language model that prefers the label which it finds more probable after the question.

    The log-probability of a label is the sum over its tokens; equal ones are a tie.

    Args:
        model: folder of an export, or a name on the hub.
        template: the question, with `{query}`, `{first}` and `{second}`; a label follows its end.
        labels: of the first and of the second response.
        batch_size: questions that go through the model at a time.
        dtype: of the weights.
    """

    def __init__(
        self,
        model: str,
        template: str = TEMPLATE,
        labels: tuple[str, str] = (" A", " B"),
        batch_size: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        check_template(template)
        at_least("judge.batch_size", batch_size, 1)
        if labels[0] == labels[1] or not all(labels):
            raise UserError("judge.labels must be two different texts.")
        self.template, self.labels, self.dtype = template, list(labels), dtype
        self._model, self._batch_size = model, batch_size

    @property
    def name(self) -> str:
        """The last part of the model's name; of an export, with the folder of its run."""
        parts = Path(self._model).parts
        return "/".join(parts[-2:]) if parts[-1] == "export" else parts[-1]

    def settings(self) -> dict[str, Any]:
        """Model (by its contents), template, labels and precision."""
        from rlhf.evaluation import fingerprints

        return {**super().settings(), "model": fingerprints.of_model(self._model, "judge.model")}

    def prepare(self, answers: Path) -> None:
        """Read the answers that are there; refuse a reward model."""
        from rlhf.models.loading import check_language_model, load_config

        check_language_model(load_config(self._model, "judge.model"), self._model, "judge.model")
        super().prepare(answers)

    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Verdict], None, None]:
        """Ask in batches."""
        import torch

        from rlhf.evaluation.reward_scorer import best_device
        from rlhf.models.loading import PAD_TOKEN, load_causal_lm, load_tokenizer

        tokenizer = load_tokenizer(self._model, PAD_TOKEN, "judge.model")
        prepared = [(question, *self._sequences(tokenizer, question)) for question in questions]
        model: Any = load_causal_lm(self._model, "judge.model", getattr(torch, self.dtype))
        self._check_context(model, max(len(ids) for _, *pair, _ in prepared for ids in pair))
        model = model.to(str(best_device())).eval()
        for start in range(0, len(prepared), self._batch_size):
            batch = prepared[start : start + self._batch_size]
            sequences = [ids for _, *pair, _ in batch for ids in pair]
            kept = max(len(ids) - shared for _, *pair, shared in batch for ids in pair)
            logprobs = label_logprobs(model, sequences, [shared for *_, shared in batch for _ in range(2)], kept)
            for (question, *_), (first, second) in zip(batch, logprobs.view(-1, 2).tolist(), strict=True):
                verdict: Verdict = "first" if first > second else "second" if second > first else "tie"
                self._answers.append(question.key, Entry(verdict, f"{first:.4f} {second:.4f}"))
                yield question, verdict

    def _sequences(self, tokenizer: Any, question: Question) -> tuple[list[int], list[int], int]:
        """The token ids of the question with each label, and how many of them they share."""
        from rlhf.data.texts import encode

        prompt = self.template.format(query=question.query, first=question.first, second=question.second)
        first, second = (encode(tokenizer, prompt + label) for label in self.labels)
        differing = (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        return first, second, next(differing, min(len(first), len(second)))

    def _check_context(self, model: Any, longest: int) -> None:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise UserError(
                f"judge: the longest question has {longest} tokens, more than the {positions} positions of "
                f"{self._model}; shorten judge.template, or choose another model."
            )


def label_logprobs(model: Any, sequences: list[list[int]], shared: list[int], kept: int) -> Tensor:
    """Log-probability of the tokens of each sequence from position `shared` on, `(len(sequences),)`.

    What stands before is common to the sequences of a question, so that its probability does not matter.

    Args:
        model: causal language model.
        sequences: token ids.
        shared: for each, how many tokens come first.
        kept: the largest number of tokens that follow.
    """
    import torch

    from rlhf.ops.sequences import model_inputs, pad_sequences, token_logprobs

    ids, mask = (x.to(model.device) for x in pad_sequences(sequences, 0, "left"))
    with torch.no_grad():
        logits = model(**model_inputs(ids, mask), use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]
    logprobs, _ = token_logprobs(logits, ids[:, -kept:])
    own = torch.tensor([len(s) - n for s, n in zip(sequences, shared, strict=True)], device=ids.device)
    counted = torch.arange(kept, device=ids.device) >= kept - own.unsqueeze(1)
    return (logprobs * counted).sum(-1)
