"""What a dashboard sets on a running engine: its load, its limits, its policy; and who is cancelled."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nbengine.burst import SHAPES, burst
from nbengine.checks import as_int
from nbengine.errors import NBEngineError
from nbengine.policy import policies

if TYPE_CHECKING:
    from nbengine.engine import Engine

CONTROLS = ("cancel", "cancel_all", "burst", "limits", "policy")
LISTED = 200  # requests that can be chosen to be cancelled


def settings(engine: Engine | None) -> dict[str, Any] | None:
    """The present ones, and what there is to choose from; None where there is no engine to set. From any thread."""
    if engine is None:
        return None
    stats, info = engine.stats(), engine.info
    policy = type(engine.policy)
    requests = dict.fromkeys([one.request_id for one in list(engine.trace.sequences.values()) if one.last_step == sys.maxsize])
    return {
        "requests": list(requests)[:LISTED],
        "max_num_seqs": stats["max_num_seqs"],
        "most_seqs": info.max_num_seqs,
        "max_num_batched_tokens": stats["max_num_batched_tokens"],
        "most_tokens": info.max_num_batched_tokens,
        "policy": next((name for name, kind in policies.items() if kind is policy), policy.__qualname__),
        "policies": list(policies),
        "shapes": list(SHAPES),
    }


def control(engine: Engine | None, name: str, value: Any) -> str:
    """Do one of CONTROLS; what to say of it. Waits for the engine's thread, so it is not for the front's."""
    if engine is None:
        raise NBEngineError("there is no engine to control, or it was closed")
    match name:
        case "cancel":
            engine.cancel(str(value))
            return f"{value} was cancelled"
        case "cancel_all":
            return f"{engine.cancel_all()} requests were cancelled"
        case "burst":
            return burst(engine, **value).told
        case "limits":
            engine.set_limits(**{key: as_int(number) for key, number in value.items()})
        case "policy":
            engine.use(policy=str(value))
    return ""
