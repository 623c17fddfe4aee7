"""The qcow2 format. `spec` declares the bytes on disk; the others each do one thing with them.

Nothing is imported here: opening an image must not pay for creating one.
"""
