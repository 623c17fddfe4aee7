"""The front end: NBD towards clients.

Everything here is sans-IO (it eats bytes and gives back bytes and values, and knows no
socket, no clock and no trio) but for connection.py with its outbox.py and late.py, and
poller.py. The modules follow the life of a connection: handshake.py and options.py
negotiate it, requests.py cuts the stream into requests, validate.py refuses the wrong
ones, batch.py does at once what can be done at once, late.py and commands.py the
rest, replies.py encodes the answers. proto.py declares every message; wire.py holds the fast
twins of the few that are met once per request.

The source for all of it is the NBD protocol document (NetworkBlockDevice/nbd,
doc/proto.md), called "the document" below. Where it leaves the choice to the server,
qemu-nbd's choice is taken.
"""
