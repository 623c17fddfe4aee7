"""Fuzzing: what any bytes at all may do to the server, and what they may not.

A target is a plain function of bytes with its invariants in the first line of its module; it raises
if they do not hold. The same functions run under hypothesis and over the kept corpus in `make
test`, and coverage-guided, by atheris, in `make fuzz` (`python -m fuzz`).

    targets.py              the table of them           loop.py      trio, stepped by hand
    handshake.py            client bytes before the first request
    requests.py             client bytes after it, parsed
    transmission.py         the same, served by a real connection
    header.py image.py      what may stand in a qcow2 file
    option_strings.py       what may stand on a command line, and in an image's backing file name
    mutate.py               mutations that know where messages and tables begin
    __main__.py child.py    the long run                keep.py      what is kept of its inputs
    planted.py              bugs for the targets to find
    damages.py              what it costs to refuse a damaged image

What is in corpus/ was found by that run and made small by keep.py: each file reaches something in
the package that no smaller one does.
"""
