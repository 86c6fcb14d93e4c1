"""Problems of tokenised data that are no errors: they are counted and shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset


class QualityIssue(NamedTuple):
    """A problem of some rows: how many of how many have it, what it is, and what to do."""

    found: int
    rows: int
    what: str
    advice: str

    @property
    def sentence(self) -> str:
        """The text of a warning."""
        return f"{self.found} of {self.rows} {self.what}; {self.advice}."


_FLAGS = {
    "glued": (
        "prompts meet their responses without any blank",
        "if there should be one, set data.text.separator, for example to ' '",
    ),
    "special": ("records hold special tokens in their texts", ""),
    "equal": ("pairs are equal after truncation", "they teach nothing; raise data.text.max_response_length"),
    "blanks": ("pairs differ in blanks only", "they teach nothing but blanks"),
}
_SPECIAL = {
    False: "they are read as text; if a prompt is written in a chat format, set data.text.special_tokens to control",
    True: "they are read as control tokens, as data.text.special_tokens says",
}


def quality_issues(rows: Dataset, control: bool) -> Iterator[QualityIssue]:
    """Yields the problems that rows of a split have.

    Args:
        control: whether special tokens in texts become control ids.
    """
    for flag, (what, advice) in _FLAGS.items():
        if flag in rows.column_names and (count := sum(filter(None, rows[flag][:]))):
            yield QualityIssue(count, len(rows), what, advice or _SPECIAL[control])
    if "chosen_text" in rows.column_names:
        keys = [*_keys(rows, "query", "chosen_text", "rejected_text")]
        known = set(keys)
        turned = _keys(rows, "query", "rejected_text", "chosen_text")
        if count := sum(key in known for key in turned):
            yield QualityIssue(
                count, len(rows), "pairs contradict another one", "the same two texts are preferred both ways"
            )


def overlap(rows: Dataset, train: Dataset) -> int:
    """Counts the rows that the training data has, too."""
    columns = [c for c in ("query", "reference", "chosen_text", "rejected_text") if c in rows.column_names]
    known = set(_keys(train, *columns))
    return sum(key in known for key in _keys(rows, *columns))


def _keys(rows: Dataset, *columns: str) -> Iterator[int]:
    for batch in rows.select_columns([*columns]).iter(1000):
        texts: dict[str, list[Any]] = batch
        yield from map(hash, zip(*(texts[c] for c in columns), strict=True))
