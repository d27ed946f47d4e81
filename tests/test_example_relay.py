"""examples/relay.py, between clients and servers of others, and between sockets."""

import contextlib
import importlib.util
import socket
import subprocess
import threading

import pytest
from contract_helpers import free_port, round_trip
from example_helpers import FOREIGN, Example, is_listening, need
from helpers import ROOT, connect, patient, recv_exact, recv_until_eof, reset, scaled, wait_until

LARGE = bytes(range(256)) * 65536  # more than the socket buffers of two connections and the relay hold


@pytest.fixture
def relay_to():
    """relay_to(address, ...) -> the running pool of a Relay in this process."""
    spec = importlib.util.spec_from_file_location("example_relay", ROOT / "examples" / "relay.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with contextlib.ExitStack() as pools:

        def make(address, workers=2):
            pool = example.Relay(*address, workers=workers).pool
            pool.listen("127.0.0.1", 0)
            return pools.enter_context(pool)

        yield make


@contextlib.contextmanager
def foreign_server(*command):
    """A program that serves each client of a port by a process of its own, by socat."""
    port = free_port()
    socat = [need("socat"), f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", "EXEC:" + " ".join(command)]
    process = subprocess.Popen(socat, env=FOREIGN)
    try:
        wait_until(lambda: is_listening(port), 30)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    "client",
    [["socat", "-t", "30", "-", "TCP:127.0.0.1:{port}"], ["ncat", "127.0.0.1", "{port}"]],
    ids=["socat", "ncat"],
)
def test_a_program_that_answers_when_its_input_has_ended(client):
    """sort(1) on the other side of a relay says nothing until then."""
    need(client[0])
    lines = [f"{i * 7919 % 10007:05}\n" for i in range(10007)]
    with foreign_server("sort") as server, Example("relay.py", "--to", f"127.0.0.1:{server}") as relay:
        command = [part.format(port=relay.addr[1]) for part in client]
        ran = subprocess.run(
            command, input="".join(lines), env=FOREIGN, capture_output=True, text=True, timeout=patient(60), check=True
        )
        assert ran.stdout == "".join(sorted(lines))


def test_who_is_not_there_is_said_once_and_the_client_is_let_go():
    with Example("relay.py", "--to", f"127.0.0.1:{free_port()}") as relay:
        with connect(relay.addr) as client:
            assert client.recv(1) == b""
        wait_until(lambda: b"is turned away: " in relay.output)


@pytest.mark.parametrize("workers", [1, 3])
def test_both_ends_are_passed_on(relay_to, workers):
    """B18: the server answers only when its client has finished: nothing is lost either way, however much it is."""
    times = scaled(16, 4)

    def answer(server):
        for _ in range(times):
            peer, _ = server.accept()
            with peer:
                request = recv_until_eof(peer)
                peer.sendall(bytes(reversed(request)))

    def ask(client, request):
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = relay_to(server.getsockname(), workers)
        threads = [threading.Thread(target=answer, args=(server,))]
        threads[0].start()
        for n in range(times):
            request = LARGE[: n * len(LARGE) // times]
            with connect(pool, timeout=patient(10)) as client:
                threads.append(threading.Thread(target=ask, args=(client, request)))
                threads[-1].start()
                assert recv_until_eof(client) == bytes(reversed(request))
        for thread in threads:
            thread.join()
        wait_until(lambda: len(pool) == 0, patient(10))
        assert pool.stats().handler_errors == 0


def test_much_both_ways_at_once_and_slowly(relay_to):
    """Both sides send all before they read, and each holds the other back: no deadlock, no byte lost."""
    got = {}

    def talk(name, sock):
        sender = threading.Thread(target=sock.sendall, args=(LARGE,))
        sender.start()
        got[name] = recv_exact(sock, len(LARGE))
        sender.join()

    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = relay_to(server.getsockname(), 3)
        with connect(pool, timeout=patient(10)) as client:
            peer, _ = server.accept()
            with peer:
                threads = [threading.Thread(target=talk, args=pair) for pair in (("client", client), ("server", peer))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    assert got == {"client": LARGE, "server": LARGE}


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_is_passed_on_as_one(relay_to, who):
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = relay_to(server.getsockname())
        client = connect(pool)
        peer, _ = server.accept()
        assert round_trip_through(client, peer) == b"hello"
        broken, other = (client, peer) if who == "client" else (peer, client)
        reset(broken)
        with pytest.raises(ConnectionResetError):
            other.recv(1)
        other.close()
        wait_until(lambda: len(pool) == 0)


@pytest.mark.parametrize("slow", ["client", "server"])
def test_who_reads_late_gets_all(relay_to, slow):
    """Both have finished long before. (linger_timeout, which closing connections have, is 5 s.)"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = relay_to(server.getsockname())
        client = connect(pool, timeout=patient(30))
        peer, _ = server.accept()
        reader, writer = (client, peer) if slow == "client" else (peer, client)
        with client, peer:
            sender = threading.Thread(target=lambda: (writer.sendall(LARGE), writer.shutdown(socket.SHUT_WR)))
            sender.start()
            reader.shutdown(socket.SHUT_WR)
            assert writer.recv(1) == b""
            with pytest.raises(AssertionError):
                wait_until(lambda: len(pool) < 2, 7)
            assert recv_until_eof(reader) == LARGE
            sender.join()
        wait_until(lambda: len(pool) == 0)


def round_trip_through(client, peer):
    client.sendall(b"hello")
    peer.sendall(recv_exact(peer, 5))
    return recv_exact(client, 5)


def test_in_front_of_the_echo():
    with (
        Example("echo.py") as echo,
        Example("relay.py", "--to", f"127.0.0.1:{echo.addr[1]}") as relay,
        connect(relay.addr) as client,
    ):
        assert round_trip(client, b"hello") == b"hello"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
