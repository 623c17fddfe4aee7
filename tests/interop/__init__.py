"""Our server as a process, against the programs people use: QEMU's tools, libnbd's, fio.

Nothing here imports nbdserve.  `images` makes images with qemu-img, `client` is what runs under
the system's Python (it alone has libnbd), `tools` is what several files share.
"""
