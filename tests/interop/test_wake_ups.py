"""Several clients, busy and idle by turns: no request is left lying because nobody woke up.

A server that polls, sleeps, and hands work to threads and rings can miss a wake-up only at certain
moments; so there are bursts of all kinds of requests, pauses about as long as its spinning,
and connections that come and go. A reply that has not come after `PATIENCE` seconds never comes.
"""

import os
import random
import threading
import time

import pytest

import peers
from interop.tools import BareClient

pytestmark = [pytest.mark.peer("qemu-img"), pytest.mark.long]

MIB = 1 << 20
SIZE = 64 * MIB
CLIENTS = 4
BURSTS = 20_000 if os.environ.get("NBDSERVE_SOAK") == "1" else 500
PAUSES = (0, 1e-6, 2e-5, 5e-5, 1e-4, 3e-4, 1e-3, 5e-3)


class Client(threading.Thread):
    """`left`: the cookies of the burst that was not answered."""

    def __init__(self, path, seed):
        super().__init__()
        self.left = None
        self._path = path
        self._chooser = random.Random(seed)

    def run(self):
        client = BareClient(self._path)
        for _ in range(BURSTS):
            if self._chooser.random() < 0.01:
                client.sock.sendall(client.request(client.DISC, 0, 0, 0))
                client.close()
                client = BareClient(self._path)
            self._burst(client)
            time.sleep(self._chooser.choice(PAUSES))
        client.close()

    def _burst(self, client):
        nb_requests = self._chooser.choice((1, 1, 1, 2, 3, 8, 40, 150))
        self.left = set(range(nb_requests))
        reads = {}
        requests = b"".join(self._request(client, cookie, reads) for cookie in self.left)
        sender = threading.Thread(target=client.sock.sendall, args=(requests,))
        sender.start()  # the server takes no more while its replies are not read
        for cookie, error in client.replies(reads):
            assert not error
            self.left.remove(cookie)
            if not self.left:
                break
        sender.join()

    def _request(self, client, cookie, reads):
        command, flags = self._chooser.choice((
            (client.READ, 0), (client.READ, 0), (client.WRITE, 0), (client.WRITE, client.FUA),
            (client.FLUSH, 0), (client.TRIM, 0), (client.WRITE_ZEROES, 0)))
        if command == client.FLUSH:
            return client.request(command, cookie, 0, 0)
        length = self._chooser.choice((512, 4096, 4096, 65536))
        offset = self._chooser.randrange(0, SIZE - length, 512)
        if command == client.READ:
            reads[cookie] = length
        payload = bytes(length) if command == client.WRITE else length
        return client.request(command, cookie, offset, payload, flags)


def test_every_request_is_answered(served, tmp_path):
    image = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    with served(image) as server:
        clients = [Client(server.socket_path, seed) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert [client.left for client in clients] == [set()] * CLIENTS
    peers.qemu_img_check(image)
