"""White box: arming, receiving and flushing over real descriptors (_poll.pxd)."""

import errno
import select
import socket

import pytest
from _whitebox import Engine

IN = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI
LEVEL, ONESHOT, EDGE = 0, 1, 2


@pytest.fixture
def engine():
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_level_stays_armed_and_reports_for_as_long_as_there_is_input(engine, pair):
    ours, theirs = pair
    connection = engine.open(ours.fileno())
    assert connection.arm(True) == 0
    theirs.send(b"x")
    assert engine.poll() == engine.poll() == {ours.fileno(): select.EPOLLIN}
    assert connection.arm(True) == 0
    assert engine.controls == 1  # the second time there was nothing to tell the kernel


def test_oneshot_reports_once_until_it_is_armed_again(engine, pair):
    ours, theirs = pair
    connection = engine.open(ours.fileno(), trigger=ONESHOT)
    connection.arm(True)
    theirs.send(b"x")
    assert engine.poll() == {ours.fileno(): select.EPOLLIN}
    connection.fired()
    assert engine.poll() == {}
    connection.arm(True)
    assert engine.poll() == {ours.fileno(): select.EPOLLIN}
    assert engine.controls == 2


def test_edge_reports_each_arrival_once(engine, pair):
    ours, theirs = pair
    connection = engine.open(ours.fileno(), trigger=EDGE)
    connection.arm(True)
    theirs.send(b"x")
    assert engine.poll() == {ours.fileno(): select.EPOLLIN}
    assert engine.poll() == {}
    theirs.send(b"y")
    assert engine.poll() == {ours.fileno(): select.EPOLLIN}


@pytest.mark.parametrize("trigger", [LEVEL, ONESHOT, EDGE])
def test_a_silenced_descriptor_reports_a_hang_up_at_most_once(engine, pair, trigger):
    """An empty mask alone would report it for ever."""
    ours, theirs = pair
    connection = engine.open(ours.fileno(), trigger=trigger)
    connection.arm(True)
    connection.silence()
    theirs.send(b"x")
    assert engine.poll() == {}
    theirs.close()
    engine.poll()
    assert engine.poll() == {}


@pytest.mark.parametrize("trigger", [LEVEL, ONESHOT, EDGE])
def test_arming_late_loses_nothing(engine, pair, trigger):
    """B05."""
    ours, theirs = pair
    connection = engine.open(ours.fileno(), trigger=trigger)
    connection.arm(True)
    theirs.send(b"first")
    engine.poll()
    connection.fired()
    connection.silence()
    theirs.send(b"second")
    connection.arm(True)
    assert engine.poll()[ours.fileno()] & select.EPOLLIN
    assert connection.armed & IN == IN


def test_room_is_asked_for_only_while_it_is_wanted(engine, pair):
    ours, _theirs = pair
    connection = engine.open(ours.fileno())
    connection.arm(True)
    assert engine.poll() == {}
    connection.arm(True, want_room=True)
    assert engine.poll() == {ours.fileno(): select.EPOLLOUT}
    connection.arm(True)
    assert engine.poll() == {}


def test_output_that_the_kernel_takes_goes_at_once(engine, pair):
    ours, theirs = pair
    connection = engine.open(ours.fileno())
    connection.arm(True)
    connection.append(b"hello")
    assert connection.flush() == 0
    assert theirs.recv(10) == b"hello"
    assert engine.bytes_out == 5
    assert engine.controls == 1
    assert connection.flush() == 0


def test_output_that_the_kernel_does_not_take_waits_for_epollout_and_keeps_its_order(engine, pair):
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = engine.open(ours.fileno())
    connection.arm(True)
    data = bytes(i * i % 251 for i in range(300_000))
    connection.append(data)
    assert connection.flush() == 1
    assert connection.want_out
    assert connection.flush() == 1  # only an event is a reason to try again
    assert connection.append(b"the end")[1] is False
    got = b""
    for _ in range(10_000):
        if len(got) == len(data) + 7:
            break
        assert connection.armed & select.EPOLLOUT or not connection.want_out
        got += theirs.recv(65536)
        if engine.poll().get(ours.fileno(), 0) & select.EPOLLOUT:
            connection.flush(writable=True)
    assert got == data + b"the end"
    assert not connection.want_out
    assert not connection.armed & select.EPOLLOUT
    assert connection.armed & IN == IN


def test_a_broken_connection_drops_its_output_and_takes_no_more(engine, pair):
    ours, theirs = pair
    connection = engine.open(ours.fileno())
    connection.arm(True)
    theirs.close()
    connection.append(b"x")
    assert connection.flush() == -errno.EPIPE
    assert connection.append(b"x") == (-errno.ENOTCONN, False)
    assert connection.flush() == -errno.EPIPE


def test_receiving_gives_bytes_then_eagain_then_the_end(engine, pair):
    ours, theirs = pair
    connection = engine.open(ours.fileno())
    theirs.send(b"hello")
    assert connection.receive(3) == b"hel"
    assert connection.receive(10) == b"lo"
    assert connection.receive(10) == -errno.EAGAIN
    theirs.close()
    assert connection.receive(10) == b""


def test_an_event_carries_the_id_of_the_generation_that_was_registered(engine, pair):
    ours, theirs = pair
    connection = engine.open(ours.fileno())
    connection.arm(True)
    theirs.send(b"x")
    assert list(engine.poll()) == [connection.id & 0xFFFFFFFF]
