"""Protocol drivers: the leaves of the block graph, where bytes leave the process.

A driver presents something outside (a host file, a block device, another NBD
server) as a Node without children. Formats are no business of this package.
"""
