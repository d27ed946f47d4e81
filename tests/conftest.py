"""Fixtures for every test: a leak check around each, pools and clients that are always ended."""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, RunningPool, connect, native_threads, open_fds, patient
from hypothesis import Phase, settings
from thread_safety import must_run_alone, reason_for

# A leak is only a leak when it does not go away: a closing socket or an ending thread gets this long.
LEAK_DEADLINE = 3.0

test_failed = pytest.StashKey[bool]()

# An example that fails over a socket takes its whole deadline, and one that is being shrunk takes it again and again:
# longer than a test may last. `pytest --hypothesis-profile=default` shrinks.
settings.register_profile("suite", phases=(Phase.explicit, Phase.reuse, Phase.generate), print_blob=True)
settings.load_profile("suite")


def pytest_report_header(config):
    import tstpool._core

    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return f"tstpool {tstpool.__version__} from {tstpool._core.__file__}, GIL {'on' if gil else 'off'}"


def pytest_configure(config):
    """Ctrl-C is as in a terminal: a shell without job control ignores SIGINT in its background jobs (`make test &`),
    and the servers that tests start would inherit that. And refuse to test another copy of the package than ours."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    import tstpool

    found = Path(tstpool.__file__).resolve().parent
    if (ROOT / "tstpool").is_dir() and found != ROOT / "tstpool":
        pytest.exit(f"these tests are for {ROOT / 'tstpool'}, but {found} was imported", returncode=3)


def pytest_collection_modifyitems(config, items):
    """Under `make parallel`, marks what can't run in several threads; with TSTPOOL_TEST_ALONE=1, leaves out the rest,
    which that has run."""
    if os.environ.get("TSTPOOL_TEST_ALONE"):
        config.hook.pytest_deselected(items=[item for item in items if not must_run_alone(item)])
        items[:] = [item for item in items if must_run_alone(item)]
    if int(getattr(config.option, "parallel_threads", 1)) > 1:
        alone = 0
        for item in items:
            if reason := reason_for(item):
                item.add_marker(pytest.mark.thread_unsafe(reason=reason))
                alone += 1
        if len(items) > 1000 and alone > len(items) // 2:
            raise pytest.UsageError(f"{alone} of {len(items)} tests can't run in several threads: who left them out?")


@pytest.fixture(autouse=True, scope="module")
def cycles_of_others_are_gone():
    """A module begins without what the ones before it have left behind; what stays, pytest's own reports say, is not
    looked through again. Not before each test: a free-threaded interpreter takes 80 ms for it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[test_failed] = True
    return report


@pytest.fixture(autouse=True)
def no_leaks(request):
    """Each test gives back every descriptor and every thread that it took.

    Threads are counted twice: Python's own list names them, /proc/self/task shows also those that Python cannot see.
    A test that has already failed is not checked: its traceback keeps sockets and pools alive.
    """
    fds, threads, tasks = open_fds(), set(threading.enumerate()), native_threads()
    yield
    if test_failed in request.node.stash:
        return
    deadline = time.monotonic() + patient(LEAK_DEADLINE)
    while True:
        new_fds = {fd: target for fd, target in open_fds().items() if fds.get(fd) != target}
        new_threads = set(threading.enumerate()) - threads
        new_tasks = native_threads() - tasks
        if not (new_fds or new_threads or new_tasks):
            return
        if time.monotonic() > deadline:
            names = sorted(thread.name for thread in new_threads)
            pytest.fail(f"leaked: descriptors {new_fds}, Python threads {names}, kernel threads {sorted(new_tasks)}")
        gc.collect()  # cycles that hold sockets are the engine's business only while they can be reached
        time.sleep(0.01)


@pytest.fixture
def make_pool():
    """make_pool(handler, workers=2, ...) -> a running TstPool; arguments as RunningPool's. All stop at the end."""
    started = []

    def make(handler=None, **options):
        running = RunningPool(handler, **options)
        started.append(running)
        return running.pool

    yield make
    for running in reversed(started):
        running.stop()


@pytest.fixture
def make_client():
    """make_client(pool or address, timeout=10) -> a connected socket, closed at the end."""
    clients = []

    def make(addr, timeout=10):
        sock = connect(addr, timeout)
        clients.append(sock)
        return sock

    yield make
    for sock in clients:
        sock.close()
