from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.errors import UserError
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
    assert model.weight.is_pinned() == (here.type == "cuda")
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


# ------------------------------------------------------- pinned memory, with stand-ins for a GPU and for its library


class Cudart:
    """Keeps what is page-locked, in place of CUDA's library."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


class Tied(nn.Module):
    """Has a matrix that two layers share, a number without dimensions, a buffer, and nothing that is a power of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5, device="cpu"), nn.Linear(5, 5, bias=False, device="cpu")
        self.second.weight = self.first.weight
        self.shift = nn.Parameter(torch.tensor(0.3, dtype=torch.bfloat16, device="cpu"))
        self.register_buffer("seen", torch.tensor([True, False, True], device="cpu"))


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    """A library for a GPU that is none: what goes to it stays where it is."""
    library, to = Cudart(), Tensor.to

    def to_gpu(tensor: Tensor, device: Any, *args: Any, **kwargs: Any) -> Tensor:
        if torch.device(device).type != "cuda":
            return to(tensor, device, *args, **kwargs)
        assert kwargs["non_blocking"]
        start = tensor.data_ptr()
        assert any(at <= start and start + tensor.nbytes <= at + size for at, size in library.locked.items())
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    monkeypatch.setattr(Tensor, "to", to_gpu)
    return library


def test_an_offloaded_model_is_pinned_once_as_one_buffer_of_its_size(cudart: Cudart) -> None:
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = FrozenModel(model, "cpu")
    for _ in range(2):
        with frozen.on(torch.device("cuda")) as given:
            assert given.first.weight is given.second.weight
            assert given.first.weight.data_ptr() not in cudart.locked
            assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
        (size,) = cudart.locked.values()
        assert size == 128 + 64 + 64 + 64  # 100 bytes of the matrix, 20 of the bias, 2 of the shift, 3 of the buffer
    assert {name: value.dtype for name, value in model.state_dict().items()} == {k: v.dtype for k, v in before.items()}
    del frozen, given
    gc.collect()
    assert not cudart.locked
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_memory_that_cannot_be_pinned_is_said(cudart: Cudart) -> None:
    cudart.status = 2
    with (
        pytest.raises(UserError, match=r"error 2.*reward_placement zero3"),
        FrozenModel(Tied(), "cpu").on(torch.device("cuda")),
    ):
        pass
