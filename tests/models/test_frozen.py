from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf.models.frozen import FrozenModel


@pytest.fixture
def here(device: str) -> torch.device:
    """Where the models of these tests are made."""
    return torch.device(device)


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


def test_a_frozen_model_is_in_evaluation_mode_without_gradients(here: torch.device) -> None:
    with FrozenModel(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))).on(here) as model:
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


def test_a_model_on_the_device_is_moved_there_and_stays() -> None:
    model = Recorder()
    with FrozenModel(model).on(torch.device("meta")) as given:
        assert given is model
    assert model.places == ["meta"]


@pytest.fixture
def offloaded(here: torch.device) -> tuple[nn.Linear, FrozenModel[nn.Linear], int]:
    """A model that was used once, so that its memory is pinned for a GPU; how it is held, and where its weight lies."""
    model = nn.Linear(3, 3, device="cpu")
    frozen = FrozenModel(model, "cpu")
    with frozen.on(here):
        assert model.weight.device.type == here.type
    return model, frozen, model.weight.data_ptr()


def away(model: nn.Linear) -> None:
    """Does what a copy onto a device does: the weight lies somewhere else."""
    model.weight.data = model.weight.data + 1


def test_an_offloaded_model_is_dropped_after_use_and_its_home_copy_stays(here: torch.device, offloaded: Any) -> None:
    model, frozen, home = offloaded
    before = model.weight.detach().clone()
    for _ in range(2):
        with frozen.on(here) as given:
            assert torch.equal(given.weight.cpu(), before)
            away(model)
        assert model.weight.data_ptr() == home
        assert torch.equal(model.weight, before)


def test_an_offloaded_model_goes_back_after_an_error(here: torch.device, offloaded: Any) -> None:
    model, frozen, home = offloaded

    def fail() -> None:
        with frozen.on(here):
            away(model)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert model.weight.data_ptr() == home


def test_nested_blocks_move_an_offloaded_model_once(here: torch.device, offloaded: Any) -> None:
    model, frozen, home = offloaded
    with frozen.on(here):
        away(model)
        with frozen.on(here):
            assert model.weight.data_ptr() != home
        assert model.weight.data_ptr() != home
    assert model.weight.data_ptr() == home


def test_buffers_are_offloaded_too(here: torch.device) -> None:
    model = nn.BatchNorm1d(2, device="cpu")
    with FrozenModel(model, "cpu").on(here):
        model.running_mean.data = torch.full((2,), 7.0)
    assert model.running_mean.tolist() == [0, 0]
