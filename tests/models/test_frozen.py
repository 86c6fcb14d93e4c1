from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf.models.frozen import FrozenModel

CPU = torch.device("cpu")


class Recorder(nn.Module):
    """Records where it was moved to, in place of a second device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> Recorder:
        self.places.append(str(args[0]))
        return self


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.frozen = FrozenModel(model)


def test_a_frozen_model_is_in_evaluation_mode_without_gradients() -> None:
    with FrozenModel(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))).on(CPU) as model:
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert not model(torch.ones(1, 2)).requires_grad


def test_a_frozen_model_is_no_part_of_its_owner() -> None:
    frozen = nn.Linear(3, 3)
    holder = Holder(frozen).train()
    assert {p.shape[-1] for p in holder.parameters()} == {2}
    assert all("frozen" not in name for name in holder.state_dict())
    assert all(module is not frozen for module in holder.modules())
    assert not frozen.training
    holder.double()
    assert frozen.weight.dtype == torch.float32


@pytest.mark.parametrize(("placement", "places"), [("device", ["meta"]), ("cpu", ["meta", "cpu"])])
def test_placement(placement: Any, places: list[str]) -> None:
    model = Recorder()
    with FrozenModel(model, placement).on(torch.device("meta")) as given:
        assert given is model
        assert model.places == ["meta"]
    assert model.places == places


def test_an_offloaded_model_goes_back_after_an_error() -> None:
    model = Recorder()
    with pytest.raises(RuntimeError, match="broken"), FrozenModel(model, "cpu").on(torch.device("meta")):
        raise RuntimeError("broken")
    assert model.places == ["meta", "cpu"]


def test_nested_blocks_move_an_offloaded_model_back_once() -> None:
    model = Recorder()
    frozen = FrozenModel(model, "cpu")
    with frozen.on(torch.device("meta")):
        with frozen.on(torch.device("meta")):
            pass
        assert "cpu" not in model.places
    assert model.places[-1] == "cpu"
