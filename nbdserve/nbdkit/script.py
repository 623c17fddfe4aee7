"""What `nbdkit python` is given: it loads the callbacks, or says in one line why it cannot.

It is read by whatever Python nbdkit was built with, so it can be parsed by old ones.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("nbdserve: nbdkit's Python is %d.%d, and 3.11 is needed" % sys.version_info[:2])

try:
    from nbdserve.nbdkit.callbacks import *  # noqa: F403
except ImportError as error:
    if error.name is None or error.name.split(".")[0] not in ("trio", "construct"):
        raise
    found = sys.version.split()[0], error.name, error.name
    sys.exit(
        "nbdserve: nbdkit's Python (%s) has no module %s: install python3-%s, or use"
        " 'nbdserve nbdkit'" % found
    )
