"""Limits by measurement: a server among a thousand bad clients.

`crowd.py` are the clients, `measure.py` what the server's process holds, `test_limits.py` what must
be so; `python -m limits` (make limits) prints the table of docs/reliability.md.
"""
