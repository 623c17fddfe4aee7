"""The kernel's own NBD client: a Debian kernel in QEMU attaches to the server.

guest.py starts the guest and talks to it, initramfs.py makes what it boots from, recorder.py is a
server whose writes are on record, powercut.py makes of such a record the image after a power cut.
docs/testing-kernel.md says how to run it.
"""
