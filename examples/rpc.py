"""Remote procedure calls: JSON-RPC 2.0 messages, each with its length in front, four bytes, big-endian.

One service and two ways to write it. ``--style framing`` lets the engine cut messages; ``--style req_len`` is that of
the C++ original: a function, called for events, that says how many bytes it wants next. Nobody on the other side can
tell which one runs. Methods may block (`sleep` does): other connections are served meanwhile. A client that does not
read its replies is not read from until it does. Of the standard three things are left out: batches; the member
"jsonrpc" of a request, which is not looked at; and ids such as 1.5, or of more than 100 characters.
"""

import argparse
import contextlib
import inspect
import json
import logging
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import tstpool
from tstpool import EPOLLOUT, LengthPrefixed, MessageTooLarge, TstHandler, TstSocket, TstStat

MESSAGE_MOST = 1 << 20  # bytes without the length in front
ID_MOST = 100  # characters

# ------------------------------------------------------------------------------------------------ the service


class BadParams(ValueError):
    """Raised by a method for params that are wrong, and the client is told why. Whatever else it raises is our mistake,
    for the log alone."""


def is_number(value: object) -> bool:
    return type(value) in (int, float)  # to isinstance() true is an int


def add(*numbers: float) -> float:
    if not all(is_number(number) for number in numbers):
        raise BadParams("only numbers can be added")
    try:
        return sum(numbers)
    except OverflowError as error:
        raise BadParams("the numbers are too large") from error


def sleep(seconds: float) -> float:
    if not is_number(seconds) or not 0 <= seconds <= 10:
        raise BadParams("seconds must be 0 to 10")
    time.sleep(seconds)  # holds this worker and this connection, nobody else
    return seconds


def upper(text: str) -> str:
    if not isinstance(text, str):
        raise BadParams("text must be a string")
    return text.upper()


METHODS: dict[str, Callable[..., Any]] = {"add": add, "sleep": sleep, "upper": upper}


class Refused(Exception):
    """A request that gets an error for a reply."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.outcome = {"error": {"code": code, "message": message[:1000]}}


def parse(message: bytes) -> dict[str, Any]:
    try:
        request = json.loads(message)
    except (ValueError, RecursionError):
        raise Refused(-32700, "this is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("method"), str):
        raise Refused(-32600, "this is not a request")
    number = request.get("id")
    if type(number) not in (int, str, type(None)) or len(str(number)) > ID_MOST:
        raise Refused(-32600, "the id is neither an integer nor a short string")
    return request


def call(request: dict[str, Any]) -> Any:
    method = METHODS.get(request["method"])
    if method is None:
        raise Refused(-32601, "there is no such method")
    params = request.get("params", [])
    if not isinstance(params, list | dict):
        raise Refused(-32602, "the params are neither an array nor an object")
    try:
        bind = inspect.signature(method).bind
        bound = bind(**params) if isinstance(params, dict) else bind(*params)
    except TypeError as error:
        raise Refused(-32602, f"wrong params: {error}") from error
    try:
        return method(*bound.args, **bound.kwargs)
    except BadParams as error:
        raise Refused(-32602, f"wrong params: {error}") from error
    except Exception as error:
        # What the peer has sent may be in the error's text: %r escapes it, and the traceback is logged without it.
        where = "".join(traceback.format_tb(error.__traceback__))
        logging.error("%s failed: %r\n%s", request["method"], error, where)
        raise Refused(-32603, "the method failed") from error


def encode(number: int | str | None, outcome: dict[str, Any]) -> bytes:
    try:
        text = json.dumps({"jsonrpc": "2.0", "id": number, **outcome}, allow_nan=False)
    except ValueError:
        raise Refused(-32603, "the result has no JSON") from None
    if len(text) > MESSAGE_MOST:
        raise Refused(-32603, "the result is too long")
    return text.encode()


def answer(message: bytes) -> bytes | None:
    """The reply to a message; None when the peer wants none (a request without an id)."""
    try:
        request = parse(message)
    except Refused as refused:
        return encode(None, refused.outcome)
    number = request.get("id")
    try:
        reply = encode(number, {"result": call(request)})
    except Refused as refused:
        reply = encode(number, refused.outcome)
    return reply if "id" in request else None


# -------------------------------------------------------------------------- --style framing: the engine cuts


class Service(TstHandler):
    """Its framing is LengthPrefixed(4). No request is taken from a client for which more than the pool's high_water
    waits: that bounds what one that does not read makes us keep."""

    def on_message(self, sock: TstSocket, data: bytes) -> bytes | None:
        return answer(data)  # bytes are the reply, in a frame of their own

    def on_error(self, sock: TstSocket, exc: BaseException) -> TstStat | None:
        if isinstance(exc, MessageTooLarge):
            return None  # the client is disconnected; a line in the log for each would let strangers fill the disk
        return super().on_error(sock, exc)


# --------------------------------------------------------- --style req_len: a function says how much it wants

HEADER: Final = 4
BUFFER = 4096  # bytes in recv_data and send_data, unless a message needs more


def service(sock: TstSocket) -> TstStat:
    """Called when the bytes that were asked for are there (EPOLLIN), or when a reply has been sent (EPOLLOUT)."""
    recv = sock.recv_data
    if sock.events & EPOLLOUT or recv.req_len == 0:  # req_len is 0 at the very first call
        return want_header(sock)
    if recv.req_pos == 0:
        sock.user_data = int.from_bytes(recv.s[:HEADER], "big")
    size: int = sock.user_data
    if size > MESSAGE_MOST:
        return TstStat.DISCONNECT
    have = recv.req_pos + recv.req_len - HEADER
    if have < size:
        return want_more(sock, size, have)
    message = bytes(recv.s[HEADER : HEADER + size])
    want_header(sock)  # not later: a method may take long, a client long to read the reply
    reply = answer(message)
    return TstStat.SUSPEND if reply is None else send_reply(sock, reply)


def want_header(sock: TstSocket) -> TstStat:
    for data in (sock.recv_data, sock.send_data):
        data.req_pos = data.req_len = 0
        if data.s_len > BUFFER:
            data.resize(BUFFER)  # a long message is over: its memory goes back
    sock.recv_data.req_len = HEADER
    return TstStat.SUSPEND


def want_more(sock: TstSocket, size: int, have: int) -> TstStat:
    """The next part of a body of `size` bytes, `have` of which are there. No more than has come already, unless it fits
    anyway: to announce a long message must not cost us the memory for it."""
    recv = sock.recv_data
    step = min(size - have, max(have, BUFFER - HEADER))
    if recv.s_len < HEADER + have + step:
        recv.resize(HEADER + have + step)
    recv.req_len = step  # before req_pos: the longer request of before might not fit there
    recv.req_pos = HEADER + have
    return TstStat.SUSPEND


def send_reply(sock: TstSocket, reply: bytes) -> TstStat:
    """No request is taken from this client until it is sent: that bounds what one that does not read makes us keep."""
    data = sock.send_data
    message = len(reply).to_bytes(HEADER, "big") + reply
    if data.s_len < len(message):
        data.resize(len(message))
    data.s[: len(message)] = message
    data.req_len = len(message)
    return TstStat.SEND


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A JSON-RPC server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=20003)
    parser.add_argument("--style", choices=["framing", "req_len"], default="framing")
    parser.add_argument("--workers", type=int, default=16, help="how many methods may block at the same time")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as Ctrl-C does
    if options.style == "framing":
        framing = LengthPrefixed(HEADER, max_message=MESSAGE_MOST)
        pool = tstpool.TstPool(Service(), workers=options.workers, framing=framing)
    else:
        pool = tstpool.TstPool(service, workers=options.workers, max_recv_size=BUFFER, max_send_size=BUFFER)
    host, port = pool.listen(options.host, options.port)
    with contextlib.suppress(KeyboardInterrupt):
        print(f"rpc ({options.style}) on {host}:{port}; Ctrl-C ends it", flush=True)
        pool.serve_forever()
