"""The front end: NBD towards clients.

Everything here but connection.py is sans-IO: it eats bytes and gives back bytes and
values, knows no socket, no clock and no trio, and can be tested by calling it. The
modules follow the life of a connection: handshake.py and options.py negotiate it,
requests.py cuts the stream into requests, validate.py refuses the wrong ones,
replies.py encodes the answers. proto.py declares every message; wire.py holds the fast
twins of the few that are met once per request.

The source for all of it is the NBD protocol document (NetworkBlockDevice/nbd,
doc/proto.md), called "the document" below. Where it leaves the choice to the server,
qemu-nbd's choice is taken.
"""
