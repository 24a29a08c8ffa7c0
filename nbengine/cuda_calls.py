"""The few calls of CUDA's driver that a decoding step is made of, without letting go of Python's interpreter lock.

Every call of torch's lets go of it, and where a notebook cell keeps Python busy each time costs a fraction of a millisecond to get it
back: tens of them a step, and the GPU waits. These calls take microseconds and keep it; only waiting for an event lets go.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any

_NOT_READY = 600


@cache
def _libraries() -> tuple[Any, Any]:
    """The driver twice over: calls that keep the lock, and calls that let go of it. torch has loaded it already."""
    name = "libcuda.so.1"
    keeping, letting_go = ctypes.PyDLL(name), ctypes.CDLL(name)
    signatures = {
        "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
        "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
        "cuGraphLaunch": (c_void_p, c_void_p),
        "cuEventRecord": (c_void_p, c_void_p),
        "cuEventQuery": (c_void_p,),
        "cuEventElapsedTime": (c_void_p, c_void_p, c_void_p),
    }
    for function, types in signatures.items():
        getattr(keeping, function).argtypes = types
        getattr(keeping, function).restype = c_int
    letting_go.cuEventSynchronize.argtypes = (c_void_p,)
    letting_go.cuEventSynchronize.restype = c_int
    return keeping, letting_go


class CudaCalls:
    """On one stream, given as a number, as are events, graphs and addresses."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self._keeping, self._letting_go = _libraries()

    def send(self, target: int, source: int, size: int) -> None:
        """Copy bytes from pinned memory to the device."""
        _check(self._keeping.cuMemcpyHtoDAsync_v2(target, source, size, self.stream))

    def fetch(self, target: int, source: int, size: int) -> None:
        """Copy bytes from the device to pinned memory."""
        _check(self._keeping.cuMemcpyDtoHAsync_v2(target, source, size, self.stream))

    def launch(self, graph: int) -> None:
        _check(self._keeping.cuGraphLaunch(graph, self.stream))

    def record(self, event: int) -> None:
        _check(self._keeping.cuEventRecord(event, self.stream))

    def passed(self, event: int) -> bool:
        code = self._keeping.cuEventQuery(event)
        if code != _NOT_READY:
            _check(code)
        return code != _NOT_READY

    def wait(self, event: int) -> None:
        """Wait for an event; the one call that lets go of the interpreter."""
        _check(self._letting_go.cuEventSynchronize(event))

    def seconds(self, began: int, ended: int) -> float:
        """Between two events that have passed."""
        milliseconds = c_float()
        _check(self._keeping.cuEventElapsedTime(byref(milliseconds), began, ended))
        return milliseconds.value * 1e-3


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")
