"""What passes between the host and a device with every step: one copy there, one back, neither of which anybody waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


_VIEWS = 4096


class Mark:
    """A point in a device's work; on a CPU, where nothing is left to be done, it has always been passed."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None

    def set(self) -> None:
        if self._event is not None:
            self._event.record()

    @property
    def passed(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Between two marks that were passed."""
        if self._event is None or earlier._event is None:
            return 0.0
        return 1e-3 * earlier._event.elapsed_time(self._event)


class Slot:
    """Memory of a step in flight that the device reads and writes by itself: nobody else's until the step has landed."""

    def __init__(self, size: int, samples: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self.sent = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
        self.numbers: NDArray[np.int32] = self.sent.numpy()
        self.drawn = torch.empty(samples, dtype=torch.int64, pin_memory=self._pinned)
        self.drawn_numbers: NDArray[np.int64] = self.drawn.numpy()
        self.began, self.ended = Mark(device), Mark(device)

    def need(self, size: int) -> None:
        """Make room for so many numbers."""
        if len(self.sent) < size:
            self.sent = torch.empty(max(size, 2 * len(self.sent)), dtype=torch.int32, pin_memory=self._pinned)
            self.numbers = self.sent.numpy()


class Staging:
    """The slots, and the device's side of what is sent: one place, since the steps there come one after the other."""

    def __init__(self, size: int, samples: int, device: torch.device) -> None:
        self.device = device
        self.step = torch.zeros(size, dtype=torch.int32, device=device)  # a fixed place: graphs read it
        self._views: dict[tuple[int, int], torch.Tensor] = {}
        self._updates = torch.zeros(size, dtype=torch.int32, device=device)
        self._samples = samples
        self._free: list[Slot] = []

    def take(self) -> Slot:
        return self._free.pop() if self._free else Slot(len(self.step), self._samples, self.device)

    def give_back(self, slot: Slot) -> None:
        self._free.append(slot)

    def send(self, slot: Slot, count: int) -> torch.Tensor:
        """The first `count` of the slot's numbers go to the fixed place."""
        return self.first(self.step, count).copy_(self.first(slot.sent, count), non_blocking=True)

    def first(self, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """A view of a lasting tensor's first numbers, made once: whatever is asked of torch lets go of the interpreter, which may be long away."""
        key = tensor.data_ptr(), count
        view = self._views.get(key)
        if view is None:
            if len(self._views) > _VIEWS:
                self._views.clear()
            view = self._views[key] = tensor[:count]
        return view

    def send_updates(self, slot: Slot, first: int, count: int) -> torch.Tensor:
        """`count` of the slot's numbers from `first` on, to where the next ones will be put too."""
        if len(self._updates) < count:
            self._updates = torch.zeros(2 * count, dtype=torch.int32, device=self.device)
        return self._updates[:count].copy_(slot.sent[first : first + count], non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that will be there when the device's work so far is done."""
    if tensor.device.type == "cpu":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
