"""Echo with Twisted: a Protocol, on its default reactor."""

from twisted.internet import reactor
from twisted.internet.protocol import Factory, Protocol


class Echo(Protocol):
    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)  # as the other servers do

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


if __name__ == "__main__":
    port = reactor.listenTCP(0, Factory.forProtocol(Echo), backlog=4096, interface="127.0.0.1")
    print(port.getHost().port, flush=True)
    reactor.run()
