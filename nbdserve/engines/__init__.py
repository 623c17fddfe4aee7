"""I/O engines: how reads, writes and syncs of a host file reach the kernel.

An engine knows file descriptors, offsets and buffers, and nothing of images,
nodes or NBD. It imports only nbdserve.errors.
"""
