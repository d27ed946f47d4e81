"""The command line: ``python -m tstpool echo`` and ``python -m tstpool demo``.

The commands draw with ``rich``, which the engine itself never needs. So it is imported only once a command is known:
``--help`` and ``--version`` work without it, and a command says in one sentence how to get it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import tstpool

WITHOUT_RICH = "tstpool: the command line needs the package 'rich': pip install rich"
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def number(smallest: int, largest: int = 2**31 - 1) -> Callable[[str], int]:
    """Return an argparse type: a whole number within these limits."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} to {largest}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Parse an argument that is a time: longer than nothing, shorter than a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 86_400.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and up to 86400")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tstpool", description="A TCP engine whose handlers may block.")
    parser.add_argument("--version", action="version", version=f"tstpool {tstpool.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="echo | demo")

    echo = commands.add_parser("echo", help="run an echo server until Ctrl-C, with one status line a second")
    echo.add_argument("--host", default="127.0.0.1", help="address to listen on, or unix:/path (default: %(default)s)")
    echo.add_argument("--port", type=number(0, 65535), default=20001, help="0: any free one (default: %(default)s)")
    echo.add_argument("--workers", type=number(1, 1024), help="threads (default: cores + 4, at most 32)")
    echo.add_argument("--seconds", type=seconds, help="stop by itself after this time")

    demo = commands.add_parser("demo", help="run a server and seven kinds of clients, and check every byte")
    demo.add_argument("--seconds", type=seconds, default=6.0, help="how long clients talk (default: %(default)s)")
    demo.add_argument(
        "--workers", type=number(2, 1024), help="threads; one of them at least will be blocked at any time"
    )

    for command in (echo, demo):
        command.add_argument(
            "--trigger", choices=("level", "oneshot", "edge"), default="level", help="how epoll reports"
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 something was wrong, 2 wrong use, 130 cut short by Ctrl-C.

    The echo server is done when Ctrl-C ends it: 130 is for one that comes before it serves, or while it stops.
    """
    options = make_parser().parse_args(arguments)
    try:
        from tstpool._cli import demo, echo

        return echo.run(options) if options.command == "echo" else demo.run(options)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print(WITHOUT_RICH, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
