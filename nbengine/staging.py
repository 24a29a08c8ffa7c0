"""What passes between the host and a device with every step: copies that nobody waits for, and marks in the device's work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbengine.cuda_calls import CudaCalls
from nbengine.switch_interval import urgent

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Mark:
    """A point in a device's work; on a CPU, where nothing is left to be done, it has always been passed."""

    def __init__(self, calls: CudaCalls | None) -> None:
        self._calls = calls
        self._event = None if calls is None else torch.cuda.Event(enable_timing=True)
        self._handle = 0
        if self._event is not None:
            self._event.record()  # which makes it
            self._handle = self._event.cuda_event

    def set(self) -> None:
        if self._calls is not None:
            self._calls.record(self._handle)

    @property
    def passed(self) -> bool:
        return self._calls is None or self._calls.passed(self._handle)

    def wait(self) -> None:
        if self._calls is not None and not self._calls.passed(self._handle):
            with urgent():
                self._calls.wait(self._handle)

    def seconds_since(self, earlier: Mark) -> float:
        """Between two marks that were passed."""
        return 0.0 if self._calls is None else self._calls.seconds(earlier._handle, self._handle)


class Slot:
    """Memory of a step in flight that the device reads and writes by itself: nobody else's until the step has landed.

    What the host writes there it writes as words, which keeps the interpreter: numpy lets go of it to copy many numbers, or strided ones.
    """

    def __init__(self, size: int, samples: int, calls: CudaCalls | None) -> None:
        self._pinned = calls is not None
        self.step = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
        self.updates = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
        self.drawn = torch.empty(samples, dtype=torch.int64, pin_memory=self._pinned)
        self.step_words = self.step.numpy().data
        self.update_words = self.updates.numpy().data
        self.drawn_numbers: NDArray[np.int64] = self.drawn.numpy()
        self.began, self.ended = Mark(calls), Mark(calls)

    def room_for_updates(self, count: int) -> memoryview:
        """The first `count` numbers of what updates the tables."""
        if len(self.updates) < count:
            self.updates = torch.empty(2 * count, dtype=torch.int32, pin_memory=self._pinned)
            self.update_words = self.updates.numpy().data
        return self.update_words[:count]


class Staging:
    """The slots, and the device's side of what is sent: one place, since the steps there come one after the other."""

    def __init__(self, size: int, samples: int, device: torch.device) -> None:
        self.device = device
        self.calls = CudaCalls(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else None
        self.step = torch.zeros(size, dtype=torch.int32, device=device)  # fixed places: graphs read them
        self.updates = torch.zeros(size, dtype=torch.int32, device=device)
        self._samples = samples
        self._free: list[Slot] = []

    def take(self) -> Slot:
        return self._free.pop() if self._free else Slot(len(self.step), self._samples, self.calls)

    def give_back(self, slot: Slot) -> None:
        self._free.append(slot)

    def send(self, slot: Slot, count: int) -> None:
        """The first `count` of the step's numbers go to their fixed place."""
        _send(self.calls, self.step, slot.step, count)

    def send_updates(self, slot: Slot, count: int) -> torch.Tensor:
        """The first `count` of the updates' numbers go to theirs, or elsewhere if they are too many for it."""
        if count > len(self.updates):
            return slot.updates[:count].to(self.device, non_blocking=True)
        _send(self.calls, self.updates, slot.updates, count)
        return self.updates

    def fetch(self, slot: Slot, drawn: torch.Tensor, count: int) -> None:
        """What was drawn comes to the slot."""
        if self.calls is None:
            slot.drawn[:count].copy_(drawn[:count])
        else:
            self.calls.fetch(slot.drawn.data_ptr(), drawn.data_ptr(), 8 * count)


def _send(calls: CudaCalls | None, target: torch.Tensor, source: torch.Tensor, count: int) -> None:
    if calls is None:
        target[:count].copy_(source[:count])
    else:
        calls.send(target.data_ptr(), source.data_ptr(), 4 * count)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that will be there when the device's work so far is done."""
    if tensor.device.type == "cpu":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
