"""B44, B62: a unix socket's file is taken from a dead server, never from one that is about to listen."""

import errno
import fcntl
import os
import socket
import threading

import pytest
from contract_helpers import handler, round_trip
from helpers import connect, open_fds, patient, run_python, wait_until

from tstpool import TstPool


@pytest.fixture(params=[False, True], ids=["no-file", "old-file"])
def path(tmp_path, request):
    if request.param:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "socket"))
    return str(tmp_path / "socket")


def answering(reply):
    return lambda sock, data: reply


class Between:
    """Does something, once, when a socket has got its name and does not listen yet."""

    def __init__(self, monkeypatch, act):
        self.act = act
        monkeypatch.setattr(socket.socket, "listen", lambda sock, *rest: self.listen(sock, *rest), raising=False)

    def listen(self, sock, *rest):
        act, self.act = self.act, None
        if act is not None:
            act()
        socket.SocketType.listen(sock, *rest)


def times_open(folder):
    return list(open_fds().values()).count(str(folder))


def test_while_the_first_does_not_listen_yet(monkeypatch, tmp_path, path):
    """B44, B62: the second waits, and is told then that the path is in use; clients reach the first."""
    first, second = (TstPool(handler(on_message=answering(word)), workers=1) for word in (b"1", b"2"))
    outcome = []

    def start():
        try:
            outcome.append(second.listen(f"unix:{path}"))
        except OSError as error:
            outcome.append(error.errno)

    rival = threading.Thread(target=start)

    def meanwhile():
        rival.start()
        wait_until(lambda: outcome or times_open(tmp_path) == 2)

    Between(monkeypatch, meanwhile)
    monkeypatch.setattr("tstpool._net.FOLDER_PATIENCE", patient(10))  # the first one may be held up for a second
    first.listen(f"unix:{path}")
    rival.join(patient(20))
    monkeypatch.undo()
    assert outcome == [errno.EADDRINUSE]
    with first, connect(f"unix:{path}") as client:
        assert round_trip(client, b"x") == b"1"
    second.stop()


def test_a_lock_of_somebody_elses_is_not_waited_for_for_ever(monkeypatch, tmp_path, path):
    """B44: any program may lock a folder that it may read, /tmp, say."""
    monkeypatch.setattr("tstpool._net.FOLDER_PATIENCE", 0.05)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with TstPool(handler(on_message=answering(b"1"))) as pool:
        pool.listen(f"unix:{path}")
        with connect(f"unix:{path}") as client:
            assert round_trip(client, b"x") == b"1"
    os.close(folder)


def test_the_lock_is_gone_as_soon_as_it_listens(monkeypatch, tmp_path, path):
    """B45: also when another thread has forked meanwhile, and the child has the folder's descriptor, too."""
    childs = []

    def fork():
        (number,) = (number for number, target in open_fds().items() if target == str(tmp_path))
        childs.append(os.dup(number))

    Between(monkeypatch, fork)
    pool = TstPool(handler())
    pool.listen(f"unix:{path}")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for number in (folder, *childs):
        os.close(number)
    pool.stop()


UNREADABLE = """
import encodings.idna, socket  # where a user may not look for it
import os, sys, tstpool
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setresuid(54321, 54321, 54321)
try:
    os.listdir(".")
except PermissionError:
    print("unreadable")
pool = tstpool.TstPool(lambda sock: None, workers=1)
print(pool.listen("unix:socket"))
pool.start()
print(pool.stop(), os.path.exists("socket"))
"""


def test_a_folder_that_may_not_be_read_will_do(tmp_path):
    """B44: to make a file there is enough, though nobody else is kept away meanwhile."""
    os.chmod(tmp_path, 0o333)
    try:
        out = run_python("-c", UNREADABLE, str(tmp_path)).stdout
    finally:
        os.chmod(tmp_path, 0o777)
    assert out == "unreadable\n('unix:socket', 0)\nTrue False\n"
