"""Errors from below: whatever the host's files answer, at every operation in turn.

`faulty` is a file that fails as planned, `programs` what is done to an image on it, `trial` does it
and holds what comes out against what may; the tests choose. `make faults` runs all there is and
says how many faults were injected.
"""
