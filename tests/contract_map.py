"""Which tests prove which promise: reads it off the tests' docstrings and writes tests/CONTRACT.md.

A test names the rows that it proves in its docstring: "S12", "S36", "defect 4". Run `python tests/contract_map.py`
after changing one; tests/test_contract_map.py fails until the page is up to date.
"""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS / "CONTRACT.md"

ROWS = {
    "S1": "one epoll manages all sockets; all are non-blocking",
    "S2": "`create()` listens and starts the threads in one call; a failure leaves no thread",
    "S3": "connections live in a table, by descriptor and by a 64-bit id that is never used again",
    "S4": "a client's message calls the handler on a worker",
    "S5": "client mode: `addsocket()` and `connect()` put sockets that do not listen under the pool's care",
    "S6": "`need_send()`, from any thread: the handler is called with EPOLLOUT as soon as the kernel takes output",
    "S7": "a message to another client: its `send_data` and `need_send()`, or `send()` from any thread",
    "S8": "no lock is needed for that; a closed socket raises `ConnectionClosed`",
    "S9": "a descriptor that is gone is harmless, and its successor is never reached by mistake",
    "S10": "a reply to the current client needs no `need_send()`",
    "S11": "`req_len`, `req_pos`, `com_len`: a region of the buffer, transferred exactly",
    "S12": "`SEND` sends it over as many EPOLLOUTs as it takes, then calls the handler; SUSPEND receives it",
    "S13": "after writing directly: `req_len = 0` and SUSPEND, which None means too",
    "S14": "`SEND` with nothing to send calls again at once; others get their turn, and `spins` counts it",
    "S15": "at most one worker is in one socket's handlers",
    "S16": "a message in pieces is accumulated up to `req_len` before the handler is called",
    "S17": "header, then body: the body arrives whole",
    "S18": "buffers may be resized in a handler; views stay valid",
    "S19": "listeners are accepted automatically and never reach the handler",
    "S20": "handlers see channels only; socket types 0 to 6",
    "S21": "buffers are made when first needed; `s_len` reads as asked",
    "S22": "`setEventNewConnected`, `on_connect`: first of all, may send, may refuse",
    "S23": "`setEventDisconnected`, `on_disconnect`: once for each accepted connection, never beside the handler",
    "S24": "`setEventMostElapsed`; `on_slow` for each job over `slow_handler`",
    "S25": "`sock.events` holds the epoll bits",
    "S26": "hang-ups and errors are the pool's business, after every byte that had arrived was delivered",
    "S27": "`closesocket()` and `close()`: any thread, any number of times",
    "S28": "`DISCONNECT` closes the current client; what was queued is sent first",
    "S29": 'triggers "level", "oneshot" and "edge"',
    "S30": "EPOLLIN, EPOLLPRI: data to receive; EPOLLOUT: can send, or has sent",
    "S31": "`req_len` beyond the buffer is a ValueError and harms nothing",
    "S32": "with `req_len` 0 the handler reads by itself; `checked_len` says how much waits",
    "S33": "one call never carries more than one message",
    "S34": "`destroy()` and `stop()` wait for handlers, send what is queued, kill nobody",
    "S35": "what the kernel must be able to do is asked at start-up",
    "S36": "statistics per worker",
    "S37": "`on_idle` after `idle_time` without work",
    "S38": "`user_data` and a handler per socket, which passes on with RUN",
    "S39": "a mutex between workers is `threading.Lock`",
    "S40": "return values 0, 1, 2, 3, 4, 9, 10",
    "defect 1": "a lost wake-up: echoes that take seconds",
    "defect 2": "a dispatcher that spins while every worker is busy",
    "defect 3": "a listener that stays deaf after a failing `accept`",
    "defect 4": "data lost that arrives together with a FIN",
    "defect 5": "one peer that does not read parks a worker",
    "defect 6": "use after free when one thread fills another connection's buffer while it closes",
    "defect 7": "`need_send` lets two workers into one handler",
    "defect 8": "a failed `read` counted as a length; a request beyond the buffer",
    "defect 9": "an event that reaches the wrong connection after a descriptor was used again",
    "defect 10": "a stop that kills threads and frees what they use",
}


def rows_of(docstring):
    """The rows that a docstring names: "S3, S8" or "S1-S40" or "defects 6 and 9"."""
    for match in re.finditer(r"\bS(\d+)(?:-S(\d+))?\b", docstring):
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield f"S{number}"
    for match in re.finditer(r"\b[Dd]efects? ((?:\d+(?:, | and )?)+)", docstring):
        for number in re.findall(r"\d+", match[1]):
            yield f"defect {number}"


def find_tests(rows=ROWS, names=rows_of, folders=(".",)):
    """{row: [(file, test)]}, from the docstrings of the tests over real sockets, or of those in `folders`.

    `names` yields the rows that a docstring names.
    """
    found = {row: [] for row in rows}
    for path in sorted(path for folder in folders for path in (TESTS / folder).glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for row in dict.fromkeys(names(ast.get_docstring(node) or "")):
                    found[row].append((path.relative_to(TESTS).as_posix(), node.name))
    return found


def cell(tests):
    """The cell of a table that says which tests of which files prove its row."""
    by_file = {}
    for file, test in tests:
        by_file.setdefault(file, []).append(test)
    return "<br>".join(
        f"[{file}]({file}): " + ", ".join(f"`{name}`" for name in names) for file, names in by_file.items()
    )


def render():
    lines = [
        "# What is promised, and which tests prove it",
        "",
        "S1 to S40 are the promises of the C++ class that tstpool began as; the ten defects are what it did wrong.",
        "This page is made from the tests' docstrings by `python tests/contract_map.py`; a test checks it.",
        "",
        "| row | in short | tests |",
        "|---|---|---|",
    ]
    for row, tests in find_tests().items():
        lines.append(f"| {row} | {ROWS[row]} | {cell(tests)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
