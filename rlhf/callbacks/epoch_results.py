"""Metrics of an epoch in whose middle a run stops: Lightning keeps their sums nowhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

KINDS = ("mean", "sum", "max", "min")
Entry = dict[str, Any]
Results = dict[str, Entry]


def _kind(meta: Any) -> str | None:
    return next((kind for kind in KINDS if getattr(meta, f"is_{kind}_reduction")), None)


def collect(trainer: Any) -> list[Results]:
    """What `self.log(..., on_epoch=True)` has added up in this epoch, per rank. Called on all ranks."""
    own: Results = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        meta = metric.meta
        if not (metric.is_tensor and meta.on_epoch and _kind(meta)) or metric.has_reset:
            continue
        own[key] = {
            "kind": _kind(meta),
            "value": metric.value.item(),
            "weight": int(metric.cumulated_batch_size) if meta.is_mean_reduction else 0,
            "name": meta.name,
            "options": {"logger": meta.logger, "prog_bar": meta.prog_bar, "sync_dist": meta.sync.should},
        }
    if trainer.world_size == 1:
        return [own]
    everyone: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyone, own)
    return everyone


class EpochResults:
    """Goes on with the sums of an epoch that an earlier process began.

    Args:
        saved: of `collect`.
        rank, world_size: of this run; where there were more or fewer processes, the first one takes all sums over.
    """

    def __init__(self, saved: list[Results], rank: int, world_size: int) -> None:
        self._left = saved[rank] if len(saved) == world_size else _share(saved, rank)

    def merge(self, trainer: Any) -> None:
        """After a batch: add the saved sums to those metrics that were logged for the first time."""
        results = trainer.fit_loop.epoch_loop._results
        for key in [k for k in self._left if k in results]:
            entry, metric = self._left.pop(key), results[key]
            _add(metric, entry)

    def finish(self, trainer: Any, module: Any) -> None:
        """At the end of the epoch: log those metrics that were logged only before the run was stopped."""
        for entry in self._left.values():
            name, kind = entry["name"], entry["kind"]
            options = {"on_epoch": True, "reduce_fx": kind, "batch_size": 0, **entry["options"]}
            module.log(name, _neutral(kind), **options)
            _add(trainer.fit_loop.epoch_loop._results[f"on_train_epoch_end.{name}"], entry)
        self._left = {}


def _neutral(kind: str) -> float:
    return {"max": float("-inf"), "min": float("inf")}.get(kind, 0.0)


def _add(metric: Any, entry: Entry) -> None:
    saved = torch.as_tensor(entry["value"], dtype=metric.value.dtype, device=metric.value.device)
    kind = entry["kind"]
    if kind in ("max", "min"):
        metric.value = getattr(torch, f"{kind}imum")(saved, metric.value)
    else:
        metric.value = saved + metric.value
    if kind == "mean":
        metric.cumulated_batch_size = metric.cumulated_batch_size + entry["weight"]
    metric._computed = None


def _share(saved: list[Results], rank: int) -> Results:
    """The results of all ranks on the first one, nothing on the others."""
    share: Results = {}
    for key, entry in saved[0].items():
        parts = [results[key] for results in saved if key in results]
        neutral = _neutral(entry["kind"])
        if rank > 0:
            share[key] = entry | {"value": neutral, "weight": 0}
            continue
        reduce = {"max": max, "min": min}.get(entry["kind"], sum)
        value, weight = reduce(p["value"] for p in parts), sum(p["weight"] for p in parts)
        share[key] = entry | {"value": value, "weight": weight}
    return share
