"""What to run next: the decisions of the scheduler, apart from their mechanism. A new policy is a few lines.

A policy reads sequences and never changes them. `Policy` itself is continuous batching, first come first served.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

from nbengine.sequence import Sequence


class Policy:
    """Continuous batching, first come first served: admit whenever there is room, decode before prefilling, evict the youngest."""

    def key(self, sequence: Sequence) -> Any:
        """Admission order: the waiting sequence with the smallest key is next. Called once, when it starts to wait."""
        return sequence.arrival, sequence.index

    def order(self, running: list[Sequence]) -> list[Sequence]:
        """The order in which running sequences are given this step's tokens and blocks; victims are taken from its end."""
        decodes = [s for s in running if s.remaining == 1]
        return decodes if len(decodes) == len(running) else decodes + [s for s in running if s.remaining > 1]

    def opens(self, running: Many[Sequence]) -> bool:
        """Whether waiting sequences may join this step, given who runs already."""
        del running
        return True

    def chunk(self, sequence: Sequence, budget: int) -> int:
        """How many of its remaining tokens a sequence computes in this step, at most `budget`."""
        return min(sequence.remaining, budget)

    def reserve(self, sequence: Sequence) -> int:
        """For how many tokens blocks are taken when a sequence is admitted; 0 takes them as they are needed."""
        del sequence
        return 0

    def victim(self, candidates: list[Sequence]) -> Sequence:
        """Who gives up its blocks and is computed again later."""
        return max(candidates, key=self.key)

    def displaces(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether a waiting sequence may take the place of a running one when there is no room; the victim is one of those."""
        del waiting, running
        return False


class PriorityPolicy(Policy):
    """The smallest priority value first, and among equals first come first served; a more urgent arrival displaces a less urgent one."""

    def key(self, sequence: Sequence) -> Any:
        return sequence.priority, sequence.arrival, sequence.index

    def order(self, running: list[Sequence]) -> list[Sequence]:
        return sorted(running, key=lambda s: (s.priority, s.remaining > 1, s.arrival, s.index))

    def displaces(self, waiting: Sequence, running: Sequence) -> bool:
        return waiting.priority < running.priority


class StaticBatching(Policy):
    """What came before continuous batching: a batch is formed, runs until its last sequence ends, and only then the next is formed."""

    def opens(self, running: Many[Sequence]) -> bool:
        return not running


class ReserveMaximum(Policy):
    """What came before paging: room for a sequence's greatest possible length is taken when it is admitted."""

    def reserve(self, sequence: Sequence) -> int:
        return sequence.limit


class StaticReserved(StaticBatching, ReserveMaximum):
    """Both at once: the serving that lessons start from."""


policies: dict[str, type[Policy]] = {
    "fcfs": Policy,
    "priority": PriorityPolicy,
    "static": StaticBatching,
    "reserve": ReserveMaximum,
    "static-reserve": StaticReserved,
}


def policy_named(policy: str | Policy | type[Policy]) -> Policy:
    """A policy by name, class or instance."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, type) and issubclass(policy, Policy):
        return policy()
    if isinstance(policy, str) and policy in policies:
        return policies[policy]()
    raise ValueError(f"scheduling_policy must be one of {sorted(policies)}, a Policy or a Policy class, not {policy!r}")
