import asyncio
import signal

import pytest

from nbengine.interrupts import hear_interrupts


@pytest.fixture(autouse=True)
def usual():
    """A test run in the background inherits an ignored interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    signal.raise_signal(signal.SIGINT)


def test_a_wait_in_a_loop_hears_an_interrupt_and_the_loop_answers_the_next():
    async def main():
        own = signal.getsignal(signal.SIGINT)
        hear_interrupts()
        hear_interrupts()
        with pytest.raises(KeyboardInterrupt):
            press()
        assert signal.getsignal(signal.SIGINT) is own
        hear_interrupts()
        assert signal.getsignal(signal.SIGINT) is not own
        await asyncio.sleep(0)
        assert signal.getsignal(signal.SIGINT) is own

    asyncio.run(main())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_an_interrupt_ends_leaves_no_handler_behind():
    async def main():
        hear_interrupts()
        press()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_nothing_is_changed_where_nobody_answers_for_a_loop(handler):
    async def main():
        signal.signal(signal.SIGINT, handler)
        hear_interrupts()
        assert signal.getsignal(signal.SIGINT) is handler

    hear_interrupts()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    asyncio.run(main())
