"""What a power cut leaves: a record of what was done to a disk, and what the disk may then hold.

* `writelog.py`: the record, in memory or in a file;
* `outcomes.py`: pure functions from a record and a moment to what the disk may hold then.

The node that keeps such a record of any other is filters/power_cut.py.
"""
