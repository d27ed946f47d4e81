"""A handler keeps parts of lent messages (copy=False) that are empty: there is nothing that would have to be kept."""

import pytest
from contract_helpers import handler
from helpers import SANITIZER, scaled, wait_until

from tstpool import Delimited, LengthPrefixed


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.parametrize(
    ("framing", "empty"),
    [(LengthPrefixed(4), bytes(4)), (Delimited(b"\r\n"), b"\r\n")],
    ids=["LengthPrefixed", "Delimited"],
)
def test_slices_of_thousands_of_empty_messages(make_pool, make_client, framing, empty):
    """Else each one would hold all that was left of the input then."""
    kept = []
    pool = make_pool(handler(on_message=lambda sock, data: kept.append(data[:])), framing=framing, copy=False)
    client = make_client(pool)
    number = scaled(10_000, minimum=1_000)
    before = resident()
    client.sendall(empty * number)
    wait_until(lambda: len(kept) == number)
    grown = resident() - before
    assert {bytes(view) for view in kept} == {b""}
    assert SANITIZER or grown < 16_000_000
