"""A client of examples/rpc.py made of Twisted's own implementation of the wire format. test_example_rpc.py starts it.

Standard input: a line of JSON, {"port": 20003, "messages": [...], "step": bytes in one write or 0, "replies": how many
to wait for}. Standard output: the replies as a JSON list, when there are so many or the server has closed.
"""

import json
import sys

from twisted.internet import protocol, reactor
from twisted.internet.testing import StringTransport
from twisted.protocols.basic import Int32StringReceiver


class Client(Int32StringReceiver):
    MAX_LENGTH = 1 << 20

    def __init__(self, plan):
        self.plan = plan
        self.replies = []

    def connectionMade(self):
        self.transport.setTcpNoDelay(True)
        real, self.transport = self.transport, StringTransport()
        for message in self.plan["messages"]:
            self.sendString(message.encode("utf-8", "surrogateescape"))
        stream, self.transport = self.transport.value(), real
        step = self.plan["step"] or len(stream)
        self.send([stream[i : i + step] for i in range(0, len(stream), step)])

    def send(self, pieces):
        """Each in a turn of its own, so that it is a write of its own."""
        if pieces and self.transport.connected:
            self.transport.write(pieces[0])
            reactor.callLater(0, self.send, pieces[1:])

    def stringReceived(self, string):
        self.replies.append(string.decode())
        if len(self.replies) == self.plan["replies"]:
            self.transport.loseConnection()

    def connectionLost(self, reason=protocol.connectionDone):
        print(json.dumps(self.replies))
        reactor.stop()


plan = json.loads(sys.stdin.readline())
factory = protocol.ClientFactory.forProtocol(Client)
factory.buildProtocol = lambda address: Client(plan)
factory.clientConnectionFailed = lambda connector, reason: reactor.stop()
reactor.connectTCP("127.0.0.1", plan["port"], factory)
reactor.run()
