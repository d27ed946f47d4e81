"""Echo with gevent: a greenlet for each connection, as its examples show it."""

import socket

from gevent.server import StreamServer
from gevent.socket import socket as Socket


def echo(client: Socket, address: tuple[str, int]) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the other servers do
    while data := client.recv(65536):
        client.sendall(data)


if __name__ == "__main__":
    server = StreamServer(("127.0.0.1", 0), echo, backlog=4096)
    server.start()
    print(server.server_port, flush=True)
    server.serve_forever()
