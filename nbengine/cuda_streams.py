"""The CUDA streams that engines run on, kept for the engines to come.

torch never destroys a stream, and CUDA launches more slowly in a process that has used more of them: on an H200 a decoding step of fifty
requests took 2.4% longer on a third stream than on the first (8B; 7% for a 0.6B), so reloading a model would cost speed until the kernel
is restarted.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable

import torch

_spare: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def stream_for(owner: object, device: torch.device) -> tuple[torch.cuda.Stream, Callable[[], object]]:
    """A stream that nobody else has, and the call that gives it back, which is made at the latest when its owner is gone."""
    spare = _spare[device]
    try:
        stream = spare.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    lent = weakref.finalize(owner, spare.append, stream)
    lent.atexit = False
    return stream, lent
