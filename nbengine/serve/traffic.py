"""What goes over a server: counters, and rates of the last seconds. Written in the front's thread, read from any."""

from __future__ import annotations

from collections import Counter
from time import monotonic
from typing import Any
from uuid import uuid4

SECONDS = 10  # that a rate looks back
WHAT = ("requests", "tokens", "bytes")


class Traffic:
    """Of all servers of one engine together."""

    def __init__(self) -> None:
        self.engine_id = uuid4().hex  # tells whoever adds up what servers say that two of them have the same engine
        self.active_requests = 0  # HTTP requests that are being answered
        self.active_streams = 0  # those of them that are answered by events
        self.open_sequences = 0  # outputs that clients wait for
        self.requests: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self.cancelled = 0  # clients that left before their answer was whole
        self.bytes_sent = 0
        self.tokens_sent = 0
        self.lasted = 0.0  # seconds of a generation, averaged over the last ones
        self._rates: dict[int, list[int]] = {}  # by second: requests, tokens, bytes

    def answered(self, endpoint: str, status: int) -> None:
        self.requests[endpoint, status] += 1
        self._now()[0] += 1

    def sent(self, size: int, tokens: int = 0) -> None:
        self.bytes_sent += size
        self.tokens_sent += tokens
        now = self._now()
        now[1] += tokens
        now[2] += size

    def took(self, seconds: float) -> None:
        self.lasted = seconds if not self.lasted else 0.9 * self.lasted + 0.1 * seconds

    def _now(self) -> list[int]:
        second = int(monotonic())
        if second not in self._rates:
            for old in [one for one in self._rates if one < second - SECONDS - 1]:
                del self._rates[old]
            self._rates[second] = [0, 0, 0]
        return self._rates[second]

    def rates(self) -> dict[str, float]:
        """Of each whole second that is past, averaged over the last SECONDS."""
        second = int(monotonic())
        past = [counts for at, counts in list(self._rates.items()) if second - SECONDS <= at < second]
        return {f"{name}_per_second": sum(counts[i] for counts in past) / SECONDS for i, name in enumerate(WHAT)}

    def stats(self) -> dict[str, Any]:
        """Plain numbers, safe to keep."""
        by_status: Counter[str] = Counter()
        by_endpoint: Counter[str] = Counter()
        for (endpoint, status), count in list(self.requests.items()):
            by_status[str(status)] += count
            by_endpoint[endpoint] += count
        return {
            "active_requests": self.active_requests,
            "active_streams": self.active_streams,
            "open_sequences": self.open_sequences,
            "requests": dict(by_status),
            "requests_by_endpoint": dict(by_endpoint),
            "requests_cancelled": self.cancelled,
            "bytes_sent": self.bytes_sent,
            "tokens_sent": self.tokens_sent,
            **self.rates(),
        }
