"""What tests of storage need and a disk does not offer: a record of what was done to it, and the
image that a power cut would leave.

* `writelog.py`: the record, in memory or in a file;
* `powercut.py`: pure functions from a record and a moment to what the disk may hold then;
* `logged.py`: a node that keeps such a record of any other.

None of it needs a test framework.
"""
