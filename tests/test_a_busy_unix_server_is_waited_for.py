"""S5: connect() to a unix socket whose backlog is full takes its time, as it does with TCP."""

import contextlib
import signal
import socket
import threading
import time

import pytest
from contract_helpers import handler, ignore
from helpers import connect, open_fds, patient, wait_until


@pytest.fixture
def busy(tmp_path):
    """A server that has accepted nobody yet, and as many clients as it lets wait."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(tmp_path / "socket"))
        server.listen(0)
        server.settimeout(patient(10))
        stack.enter_context(connect(f"unix:{tmp_path}/socket"))
        yield server


def accept_once_asked(monkeypatch, server, accepted):
    """Another thread accepts who waits, but not before somebody has been turned away."""
    refused = threading.Event()

    def connecting(sock, address):
        try:
            socket.SocketType.connect(sock, address)
        except BlockingIOError:
            refused.set()
            raise

    def accept():
        refused.wait(patient(10))
        for _ in range(2):
            accepted.append(server.accept()[0])

    monkeypatch.setattr(socket.socket, "connect", connecting, raising=False)
    thread = threading.Thread(target=accept)
    thread.start()
    return thread


@pytest.mark.parametrize("timeout", [30.0, None])
def test_until_it_has_room(monkeypatch, make_pool, busy, timeout):
    """S5: however long that takes within `timeout`; for ever with None."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    accepted = []
    thread = accept_once_asked(monkeypatch, busy, accepted)
    sock = pool.connect(f"unix:{busy.getsockname()}", timeout=timeout)
    assert sock.peer == f"unix:{busy.getsockname()}"
    thread.join(patient(10))
    accepted[1].close()
    wait_until(lambda: sock.closed)
    accepted[0].close()


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_no_longer_than_its_timeout(make_pool, busy, timeout):
    """S5: TimeoutError, with the address in its text; no descriptor stays behind."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    before, since = open_fds(), time.monotonic()
    with pytest.raises(TimeoutError, match=f"can't connect to unix:{busy.getsockname()}"):
        pool.connect(f"unix:{busy.getsockname()}", timeout=timeout)
    assert time.monotonic() - since >= timeout
    assert open_fds() == before


@contextlib.contextmanager
def alarm(caught):
    """A signal comes in a moment."""
    before = signal.signal(signal.SIGALRM, caught)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("timeout", [30.0, None])
def test_a_signal_does_not_end_the_wait(make_pool, busy, timeout):
    """B49: its handler runs, and then it is waited on. (CPython's own connect() says that it is connected.)"""
    pool = make_pool(handler(on_message=ignore), listen=None)
    accepted = []

    def accept():
        accepted.extend(busy.accept()[0] for _ in range(2))

    thread = threading.Thread(target=accept)
    with alarm(lambda *_: thread.start()):
        sock = pool.connect(f"unix:{busy.getsockname()}", timeout=timeout)
        assert sock.peer == f"unix:{busy.getsockname()}"
    thread.join(patient(10))
    for each in accepted:
        each.close()


@pytest.mark.parametrize("timeout", [30.0, None])
def test_ctrl_c_ends_the_wait(make_pool, busy, timeout):
    """B49: KeyboardInterrupt, and nothing stays behind."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    before = open_fds()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), alarm(interrupt):
        pool.connect(f"unix:{busy.getsockname()}", timeout=timeout)
    assert open_fds() == before
    assert len(pool) == 0
