"""ROUGE, by torchmetrics."""

from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(responses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L (F-measure) over pairs of texts (D16)."""
    from torchmetrics.functional.text import rouge_score

    texts = [text.strip() for text in responses], [text.strip() for text in references]
    scores = rouge_score(*texts, rouge_keys=ROUGE)
    return {name: float(scores[f"{name}_fmeasure"]) for name in ROUGE}
