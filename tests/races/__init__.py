"""Races: every interleaving that fits into the time, and each of them again from its number.

`scheduler` decides which task runs next, at every await; `history` says what a read may see;
`world` is a qcow2 image with a judge beside it; `cases` lists what is let loose on it at once;
`planted` has bugs that must be found. `python -m races` runs long (make races).
"""
