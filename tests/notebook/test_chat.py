"""%%chat and %chat in a real kernel."""

from __future__ import annotations

import pytest
from kernel_client import streaming


@pytest.fixture(autouse=True)
def no_conversations(kernel):
    kernel.run("get_ipython().find_line_magic('engine').__self__.session.conversations.clear()")
    kernel.run("get_ipython().find_line_magic('engine').__self__.session.conversations.current = 'chat'")


def messages(kernel, name: str = "chat"):
    return kernel.value(f"get_ipython().find_line_magic('engine').__self__.session.conversations[{name!r}].messages")


def test_a_conversation_keeps_its_history_and_uses_the_prefix_cache(kernel):
    kernel.run("%%chat -m 20\nTell me a story about a fox")
    ran = kernel.run("%%chat -m 8\nAnd then?")
    history = messages(kernel)
    assert [m["role"] for m in history] == ["user", "assistant", "user", "assistant"]
    assert history[2]["content"] == "And then?"
    assert "prompt tokens cached" in ran.shown[1]["text/plain"]
    assert "fox" in kernel.value("_.requests[0].prompt")


def test_a_conversation_can_be_shown_edited_forked_and_reset(kernel):
    kernel.run("%%chat ann -m 5 --system 'Be kind.'\nHello")
    assert "[1] user: Hello" in kernel.run("%chat show ann").text
    kernel.run("%chat fork ann bob")
    kernel.run("%%chat bob -m 5 --edit 1\nGood day")
    assert [m["content"] for m in messages(kernel, "bob")][:2] == ["Be kind.", "Good day"]
    assert len(messages(kernel, "bob")) == 3
    assert messages(kernel, "ann")[1]["content"] == "Hello"
    kernel.run("c = %chat show ann\nc.messages[1]['content'] = 'Hi there'")
    kernel.run("%%chat ann -m 2\nAgain")
    assert "Hi there" in kernel.value("_.requests[0].prompt")
    kernel.run("%chat undo ann")
    assert len(messages(kernel, "ann")) == 3
    kernel.run("%chat reset ann")
    assert messages(kernel, "ann") == []
    listed = kernel.run("%chat list").text
    assert "ann: 0 messages" in listed
    assert "bob: 3 messages" in listed


def test_the_last_conversation_used_is_the_one_that_goes_on(kernel):
    kernel.run("%%chat ann -m 2\nHello")
    kernel.run("%%chat -m 2\nAgain")
    assert len(messages(kernel, "ann")) == 4


def test_a_stopped_answer_stays_as_far_as_it_came(kernel):
    message = kernel.start("%%chat -m 1500 --ignore-eos --out g\nOnce")
    kernel.finish(message, streaming)
    kernel.interrupt()
    kernel.finish(message)
    assert messages(kernel)[1]["content"] == kernel.value("g.text")


def test_a_conversation_that_is_being_answered_takes_no_second_message(kernel):
    kernel.run("%%chat -m 1500 --ignore-eos --bg --out g\nOnce")
    assert "still being answered" in kernel.run("%%chat\nTwice", check=False).evalue
    kernel.run("g.cancel(); g.settle(5)")
    kernel.run("%%chat -m 2\nThrice")
    assert len(messages(kernel)) == 4


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("%chat show nobody", "no conversation 'nobody'"),
        ("%chat dance", "%chat: use"),
        ("%%chat a-b\nHi", "like a variable's"),
        ("%%chat --edit 7\nHi", "no message 7"),
    ],
)
def test_a_mistake_is_one_clear_line(kernel, cell, says):
    ran = kernel.run(cell, check=False)
    assert (ran.status, ran.ename) == ("error", "UsageError")
    assert says in ran.evalue
