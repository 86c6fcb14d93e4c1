"""A local causal language model as a judge, by the probabilities of two labels."""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from rlhf.errors import UserError
from rlhf.evaluation.judges.kept_answers import AskingJudge, Entry, Question, Verdict
from rlhf.hardware import Precision, best_device, weights_precision
from rlhf.models.finite import check_finite
from rlhf.models.loading import check_context, check_language_model, load_causal_lm, load_config, model_fingerprint
from rlhf.models.tokenizers import PAD_TOKEN, check_row, encode, load_tokenizer
from rlhf.ops.sequences import model_inputs, pad_sequences, token_logprobs
from rlhf.sampling.engines import SamplerName
from rlhf.sampling.vllm_engine import Engine, check_vllm, hand_over, start_engine
from rlhf.sampling.vllm_process import CACHE_GIB, Shape

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


LabelledPairs = list[list[list[int]]]  # token ids of a question with either label


class LocalJudge(AskingJudge):
    """A causal language model that prefers the label that it finds more probable after the question.

    The log-probability of a label is the sum over its tokens; equal ones are a tie.

    Args:
        model: folder of an export, or a name on the hub.
        template: the question, with `{query}`, `{first}` and `{second}`; a label follows its end.
        labels: of the first and of the second response.
        batch_size: questions that go through the model at a time.
        precision: of the weights; `auto` is bfloat16 on GPUs and float32 on CPUs.
        engine: what computes the probabilities: `builtin`, or `vllm` (docs/vllm.md).
    """

    def __init__(
        self,
        model: str,
        template: str = TEMPLATE,
        labels: tuple[str, str] = (" A", " B"),
        batch_size: PositiveInt = 16,
        precision: Precision = "auto",
        engine: SamplerName = "builtin",
    ) -> None:
        super().__init__(template)
        if labels[0] == labels[1] or not all(labels):
            raise UserError("judge.labels must be two different texts.")
        self.labels, self.precision = list(labels), weights_precision(precision)
        self._model, self._batch_size, self._engine = model, batch_size, engine

    @property
    @override
    def name(self) -> str:
        parts = Path(self._model).parts
        return "/".join(parts[-2:]) if parts[-1] == "export" else parts[-1]

    @override
    def settings(self) -> dict[str, Any]:
        engine = {} if self._engine == "builtin" else {"engine": self._engine}
        return {**super().settings(), "model": model_fingerprint(self._model, "judge.model"), **engine}

    @override
    def check(self) -> None:
        check_language_model(self._model, "judge.model")
        if self._engine == "vllm":
            check_vllm("judge.engine")

    @override
    def prepare(self, answers: Path) -> None:
        self.check()
        super().prepare(answers)

    @override
    def ask(self, questions: Sequence[Question]) -> Generator[tuple[Question, Verdict], None, None]:
        tokenizer = load_tokenizer(self._model, PAD_TOKEN, "judge.model")
        pairs = [[encode(tokenizer, self.prompt(question) + label) for label in self.labels] for question in questions]
        longest, largest = (max(measure(ids) for pair in pairs for ids in pair) for measure in (len, max))
        config = load_config(self._model, "judge.model")
        check_row(largest, config.get_text_config().vocab_size, tokenizer, self._model, "a question")
        longest += self._engine == "vllm"  # which wants to sample a token
        check_context(config, longest, "judge: the longest question", "shorten judge.template")
        compute = self._vllm(longest) if self._engine == "vllm" else self._builtin()
        for start in range(0, len(pairs), self._batch_size):
            part = slice(start, start + self._batch_size)
            found = check_finite(compute(pairs[part]), f"log-probabilities by judge.model {self._model}")
            logprobs = found.tolist()
            for question, (first, second) in zip(questions[part], logprobs, strict=True):
                verdict: Verdict = "first" if first > second else "second" if second > first else "tie"
                self._answers.append(question.key, Entry(verdict, f"{first:.4f} {second:.4f}"))
                yield question, verdict

    def _builtin(self) -> Callable[[LabelledPairs], Tensor]:
        model: Any = load_causal_lm(self._model, "judge.model", getattr(torch, self.precision))
        return partial(label_logprobs, model.to(str(best_device())).eval())

    def _vllm(self, longest: int) -> Callable[[LabelledPairs], Tensor]:
        dtype = getattr(torch, self.precision)
        model: Any = load_causal_lm(self._model, "judge.model", dtype)
        shape = Shape(dtype, best_device(), longest, CACHE_GIB)
        advice = "Without judge.engine the built-in one asks all questions again."
        engine = start_engine(model, shape, "judge.engine", advice)
        hand_over(model, dtype, engine)
        return partial(vllm_label_logprobs, engine)


def label_lengths(pairs: LabelledPairs) -> list[int]:
    """Counts the tokens of each label, which are those after what both rows of a pair share."""
    own = []
    for first, second in pairs:
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
        own += [len(first) - shared, len(second) - shared]
    return own


@torch.no_grad()
def label_logprobs(model: Any, pairs: LabelledPairs) -> Tensor:
    """Computes the log-probabilities of the two labels after each question, `(len(pairs), 2)`.

    A pair has the token ids of a question with either label.
    """
    ids, mask = (x.to(model.device) for x in pad_sequences([ids for pair in pairs for ids in pair], 0, "left"))
    own = label_lengths(pairs)
    kept = max(own)
    logits = model(**model_inputs(ids, mask), use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]
    logprobs, _ = token_logprobs(logits, ids[:, -kept:])
    counted = torch.arange(kept, device=model.device) >= kept - torch.tensor(own, device=model.device).unsqueeze(1)
    return (logprobs * counted).sum(-1).view(-1, 2)


def vllm_label_logprobs(engine: Engine, pairs: LabelledPairs) -> Tensor:
    """Computes what `label_logprobs` does, by an engine of vLLM."""
    rows = engine.ask("read", [ids for pair in pairs for ids in pair])
    sums = [sum(row[-own:]) for row, own in zip(rows, label_lengths(pairs), strict=True)]
    return torch.tensor(sums).view(-1, 2)
