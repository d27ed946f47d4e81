"""Echo with the standard library's thread per connection.

With 256 KiB instead of 64 it takes twice the CPU time for each small message: see _loops.py.
"""

import socket
import socketserver


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the other servers do
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 4096  # the default of 5 makes clients wait a second when they come at once


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Echo) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
