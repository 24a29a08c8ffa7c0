"""Streams are lent to one engine at a time, and again to the next."""

import gc
from collections import defaultdict

import pytest
import torch

from nbengine import cuda_streams
from nbengine.cuda_streams import stream_for

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Owner:
    pass


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The devices of the streams that were made; none is on a device here."""
    devices = []

    class Stream:
        def __init__(self, device):
            devices.append(device)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(cuda_streams, "_spare", defaultdict(list))
    return devices


def test_what_is_given_back_is_lent_again_and_what_is_lent_is_not(made):
    one, other = Owner(), Owner()
    first, give_back = stream_for(one, FIRST)
    assert stream_for(other, FIRST)[0] is not first
    give_back()
    give_back()  # no one has it twice
    owners = Owner(), Owner()
    assert stream_for(owners[0], FIRST)[0] is first
    assert stream_for(owners[1], FIRST)[0] is not first
    assert made == [FIRST] * 3


def test_an_owner_that_goes_without_giving_back_leaves_its_stream(made):
    owner = Owner()
    first, _ = stream_for(owner, FIRST)
    del owner
    gc.collect()
    assert stream_for(Owner(), FIRST)[0] is first


def test_devices_have_streams_of_their_own(made):
    one = Owner()
    _, give_back = stream_for(one, FIRST)
    give_back()
    stream_for(Owner(), SECOND)
    assert made == [FIRST, SECOND]
