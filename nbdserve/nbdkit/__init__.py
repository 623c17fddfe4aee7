"""The block stack behind nbdkit(1), as one of its Python plugins.

`script.py` is what nbdkit is given, `callbacks.py` what it calls: nbdkit-plugin(3) in terms of
`Disk`. `parameters.py` reads key=value, `loop.py` runs trio in a thread and opens images there,
`turn.py` lets nbdkit's threads call the block stack without going there, `disk.py` is an open
image as they see it, `native.py` what C needs.

Law: nothing here is imported by the rest of nbdserve but `cli/nbdkit.py`, and nothing of nbd/ or of
the server is imported here: nbdkit is the front end. nbdkit's Python is the system's: what is
imported when an image without compression is opened and served must be Python's own, trio or
construct. Only `callbacks.py` imports the module `nbdkit`, which exists in nbdkit alone.
"""
