"""The qcow2 node loses power, and dies.

plans.py makes programs of requests and the images that they run on; record.py runs one on files in
memory that keep a write log; promises.py says what must be true of whatever a crash leaves, and
search.py looks for what breaks that. `make crash` (__main__.py) searches long. The cuts themselves
are made by nbdserve.powercut.
"""
