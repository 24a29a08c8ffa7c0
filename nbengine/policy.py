"""What to run next: the decisions of the scheduler, apart from their mechanism. A new policy is a few lines.

A policy reads sequences and never changes them. `Policy` itself is continuous batching, first come first served.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from difflib import get_close_matches
from typing import Any

from nbengine.checks import as_int, told
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


LIKE = 0.85  # of 1: so much alike, one name was meant for the other
Blame = Callable[[Sequence | None, str], None]  # whose decision went wrong (None: everybody's), and how


class CheckedPolicy(Policy):
    """A user's policy as the scheduler asks it: what fails, or answers nonsense, is reported, and answered as `Policy` would.

    So a plan always comes to its end, whatever the user's code does, and those whom the decision was about can be ended after it.
    """

    def __init__(self, policy: Policy, blame: Blame) -> None:
        self.policy = policy
        self.name = type(policy).__qualname__
        self.blame = blame

    def key(self, sequence: Sequence) -> Any:
        return self._ask("key", sequence, _known, "return what sequences can be ordered by", sequence)

    def order(self, running: list[Sequence]) -> list[Sequence]:
        return self._ask("order", None, _each_once, "return running sequences, each at most once", running)

    def opens(self, running: Many[Sequence]) -> bool:
        return self._ask("opens", None, _yes_or_no, "return True or False", running)

    def chunk(self, sequence: Sequence, budget: int) -> int:
        return self._ask("chunk", sequence, _count, "return a whole number of tokens", sequence, budget)

    def reserve(self, sequence: Sequence) -> int:
        return self._ask("reserve", sequence, _count, "return a whole number of tokens, 0 for none", sequence)

    def victim(self, candidates: list[Sequence]) -> Sequence:
        return self._ask("victim", None, _one_of, "return one of the candidates", candidates)

    def displaces(self, waiting: Sequence, running: Sequence) -> bool:
        return self._ask("displaces", waiting, _yes_or_no, "return True or False", waiting, running)

    def _ask(self, method: str, whose: Sequence | None, read: Callable[..., Any], advice: str, *about: Any) -> Any:
        try:
            answer = getattr(self.policy, method)(*(list(given) if isinstance(given, list) else given for given in about))
        except BaseException as error:  # noqa: BLE001 - whatever the user's code raises, sys.exit() too, ends requests and not the engine
            self.blame(whose, f"the policy {self.name} raised {told(error)}, in {method}()")
        else:
            try:
                return read(answer, *about)
            except Exception:  # noqa: BLE001 - an answer is any object, and may raise when it is looked at
                self.blame(whose, f"the policy {self.name} answered {method}() with {_shown(answer)}: {advice}")
        return getattr(Policy, method)(_PLAIN, *about)


_PLAIN = Policy()


def _known(answer: Any, *_: Any) -> Any:
    if answer is None:
        raise TypeError
    return answer


def _each_once(answer: Iterable[Any], running: list[Sequence]) -> list[Sequence]:
    chosen, left = list(answer), set(running)
    for sequence in chosen:
        left.remove(sequence)
    return chosen


def _yes_or_no(answer: Any, *_: Any) -> bool:
    return bool(_known(answer))


def _count(answer: Any, *_: Any) -> int:
    number = as_int(answer)
    if number is None or number < 0:
        raise ValueError
    return number


def _one_of(answer: Any, candidates: list[Sequence]) -> Sequence:
    return candidates[next(i for i, candidate in enumerate(candidates) if candidate is answer)]


def _shown(answer: Any) -> str:
    try:
        text = repr(answer)
    except Exception:  # noqa: BLE001 - a user's object
        return f"a {type(answer).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def checked(policy: Policy, blame: Blame) -> Policy:
    """The policy as the scheduler asks it: those in this file are trusted."""
    return policy if type(policy) in policies.values() else CheckedPolicy(policy, blame)


def heeds_priority(policy: Policy) -> bool:
    """Whether a request's priority may change anything: in this file for one of them, and a user's own may read it."""
    return type(policy) is PriorityPolicy or type(policy) not in policies.values()


def policy_named(policy: str | Policy | type[Policy]) -> Policy:
    """A policy by name, class or instance."""
    if isinstance(policy, type) and issubclass(policy, Policy):
        policy = policy()
    if isinstance(policy, Policy):
        _warn_of_misspelt(type(policy))
        return policy
    if isinstance(policy, str) and policy in policies:
        return policies[policy]()
    raise ValueError(f"scheduling_policy must be one of {sorted(policies)}, a Policy or a Policy class, not {policy!r}")


def _warn_of_misspelt(kind: type[Policy]) -> None:
    """Say what nobody will ever call."""
    asked = [name for name in vars(Policy) if not name.startswith("_")]
    for name in dir(kind):
        meant = [] if name.startswith("_") or hasattr(Policy, name) else get_close_matches(name, asked, 1, LIKE)
        if meant and meant[0] not in vars(kind):
            warnings.warn(f"the scheduler never calls {kind.__qualname__}.{name}(); did you mean {meant[0]}()?", stacklevel=4)
