"""The smallest server: sends back what it receives. Run it, then talk to it with ``nc 127.0.0.1 20001``.

A handler may take its time (ask a database, call a slow library): other connections are served meanwhile.
"""

import tstpool


class Echo(tstpool.TstHandler):
    def on_message(self, sock: tstpool.TstSocket, data: bytes) -> None:
        sock.send(data)  # queues and returns at once; safe from any thread


if __name__ == "__main__":
    tstpool.serve(Echo(), host="127.0.0.1", port=20001)  # until Ctrl-C or SIGTERM; then what is queued is sent first
