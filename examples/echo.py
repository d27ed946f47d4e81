"""The smallest server: sends back what it receives. Run it, then talk to it with ``nc 127.0.0.1 20001``.

A handler may take its time (ask a database, call a slow library): other connections are served meanwhile.
"""

import argparse

import tstpool


class Echo(tstpool.TstHandler):
    def on_message(self, sock: tstpool.TstSocket, data: bytes) -> bytes:
        return data  # the reply; sock.send() sends at any time, from any thread


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An echo server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=20001)
    options = parser.parse_args()
    print(f"echo on {options.host}:{options.port}; Ctrl-C ends it", flush=True)
    tstpool.serve(Echo(), options.host, options.port)  # until Ctrl-C or SIGTERM; then what is queued is sent first
