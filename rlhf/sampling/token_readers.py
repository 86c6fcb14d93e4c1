"""Ways in which a language model reads rows that grow by a token at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from rlhf.hardware import sent
from rlhf.models.arguments import accepted, forward_arguments
from rlhf.models.packing import packed, packs
from rlhf.ops.sequences import model_inputs, right_padded
from rlhf.sampling.caches import cache_with_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 2**28  # logits that a forward without cache computes at most, if the model computes those of all tokens


class Reader(ABC):
    """Reads queries, then a token per row and step, and computes the logits of the tokens that come next.

    Args:
        queries, query_mask: `(B, P)`, padded on the left; without padding if the reader does not take it.
        steps: how many tokens are read after the queries at most.
    """

    model: PreTrainedModel
    takes_padding: ClassVar[bool] = True
    loses_rows: ClassVar[bool] = True
    cost: ClassVar[str] = ""  # what is slower than with the fastest reader

    @abstractmethod
    def __init__(self, model: PreTrainedModel, queries: Tensor, query_mask: Tensor, steps: int) -> None: ...

    @abstractmethod
    def read_queries(self) -> Tensor:
        """Reads the queries; returns the logits of the next tokens, `(B, V)`."""

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:
        """Reads one more token of each row, `(B,)`; returns the logits of the next ones, `(B, V)`."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Drops all rows but some, whose numbers are in order, `(b,)`."""


class KeyValueReader(Reader):
    """Keeps keys and values in a cache that has room for all steps; queries are packed if the model packs."""

    @override
    def __init__(self, model: PreTrainedModel, queries: Tensor, query_mask: Tensor, steps: int) -> None:
        self.model, self.queries, self.query_mask = model, queries, query_mask
        self.mask, self.position = F.pad(query_mask.long(), (0, steps), value=1), query_mask.sum(1, keepdim=True) - 1
        self.width = queries.shape[1]
        self.cache: Any = cache_with_room(model, steps)

    @override
    def read_queries(self) -> Tensor:
        layers: list[Any] = self.cache.layers
        if not packs(self.model) or not all(hasattr(layer, "unpack") for layer in layers):
            return self._logits(**model_inputs(self.queries, self.query_mask), logits_to_keep=1)[:, -1]
        mask, device = self.query_mask.cpu(), self.queries.device
        lengths = mask.sum(1)
        inputs = packed(self.queries, mask, first=lengths - 1)
        last = sent(lengths.cumsum(0) - 1, device)
        logits = self._logits(inputs.pop("packing"), **inputs, logits_to_keep=last)[0]
        rows, columns = (sent(x, device) for x in mask.nonzero(as_tuple=True))
        for layer in layers:
            layer.unpack(*mask.shape, (rows, columns))
        return logits

    @override
    def read(self, tokens: Tensor) -> Tensor:
        self.position = self.position + 1
        self.width += 1
        inputs = {"input_ids": tokens.unsqueeze(1), "attention_mask": self.mask[:, : self.width]}
        return self._logits(**inputs, position_ids=self.position)[:, -1]

    def _logits(self, packing: Any = None, **inputs: Any) -> Tensor:
        more = {} if packing is None else {"packing": packing}
        inputs = accepted(self.model, **inputs, past_key_values=self.cache, use_cache=True)
        logits: Tensor = self.model(**inputs, **more).logits
        return logits

    @override
    def keep(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]


class StateReader(Reader):
    """Keeps whatever state the model itself makes, of queries without padding, which few states survive."""

    takes_padding = False
    cost = "token by token from the end of the shortest query on"

    @override
    def __init__(self, model: PreTrainedModel, queries: Tensor, query_mask: Tensor, steps: int) -> None:
        self.model, self.queries, self.width = model, queries, 0
        self.rows = torch.arange(len(queries), device=queries.device)  # of the state, those that go on
        self.state: dict[str, Any] = {}

    @override
    def read_queries(self) -> Tensor:
        return self._logits(self.queries)

    @override
    def read(self, tokens: Tensor) -> Tensor:
        everywhere = tokens.new_zeros(len(self.queries), 1)
        everywhere[self.rows, 0] = tokens
        return self._logits(everywhere)[self.rows]

    def _logits(self, ids: Tensor) -> Tensor:
        positions = torch.arange(self.width, self.width + ids.shape[1], device=ids.device).expand_as(ids)
        self.width += ids.shape[1]
        inputs = accepted(self.model, input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1)
        output = self.model(**inputs, **self.state)
        # The state is what the model both returns and takes: past_key_values, cache_params or state.
        self.state = {name: output[name] for name in output if name in forward_arguments(self.model)}
        logits: Tensor = output.logits[:, -1]
        return logits

    @override
    def keep(self, rows: Tensor) -> None:
        from transformers import DynamicCache

        self.rows = self.rows[rows]
        if all(type(state) is DynamicCache for state in self.state.values()):  # others are not sure to reorder all
            for state in self.state.values():
                state.reorder_cache(self.rows)
            self.queries, self.rows = self.queries[self.rows], torch.arange(len(self.rows), device=rows.device)


class WholeReader(Reader):
    """Reads every row from its beginning at each step, rows of equal length together: right for any causal model."""

    cost = "no cache, every step reads whole rows"

    @override
    def __init__(self, model: PreTrainedModel, queries: Tensor, query_mask: Tensor, steps: int) -> None:
        ids, mask = right_padded(queries, query_mask)
        self.model, self.ids, self.lengths = model, F.pad(ids, (0, steps)), mask.sum(1)

    @override
    def read_queries(self) -> Tensor:
        logits: dict[int, Tensor] = {}
        for length in self.lengths.unique().tolist():
            rows = (self.lengths == length).nonzero().squeeze(1)
            all_logits = "logits_to_keep" not in forward_arguments(self.model)
            most = LOGITS // (length * self.model.config.get_text_config().vocab_size) if all_logits else len(rows)
            for part in rows.split(max(1, most)):
                logits |= zip(part.tolist(), self._logits(self.ids[part, :length]), strict=True)
        return torch.stack([logits[row] for row in range(len(self.ids))])

    def _logits(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        inputs = accepted(self.model, input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        logits: Tensor = self.model(**inputs).logits[:, -1]
        return logits

    @override
    def read(self, tokens: Tensor) -> Tensor:
        self.ids[torch.arange(len(self.ids), device=self.ids.device), self.lengths] = tokens
        self.lengths = self.lengths + 1
        return self.read_queries()

    @override
    def keep(self, rows: Tensor) -> None:
        self.ids, self.lengths = self.ids[rows], self.lengths[rows]
