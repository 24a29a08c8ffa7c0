"""What an error of a GPU means: no memory for this step, nothing that runs there can go on, or neither."""

from __future__ import annotations

import torch

from nbengine.errors import DeviceLostError, DeviceMemoryError


def told_apart(error: BaseException, device: torch.device) -> BaseException:
    """The error to raise in its place; itself where there is no better one."""
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceMemoryError(str(error).split(". ")[0])
    if device.type == "cuda" and isinstance(error, RuntimeError) and _lost(device):
        return DeviceLostError(
            f"the GPU met an error after which it answers this process no more ({str(error).splitlines()[0]}). Restart the kernel; "
            "nothing that runs on this GPU can go on without that"
        )
    return error


def _lost(device: torch.device) -> bool:
    """Whether the card fails at everything now: such an error stays until the process ends."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
