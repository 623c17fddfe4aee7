#!/usr/sbin/nbdkit python
"""nbdkit python plugins/qcow2.py file=disk.qcow2 [cache=...] [any image option=...]

qcow2 images behind nbdkit (docs/nbdkit.md). The plugin is nbdserve's package `nbdserve.nbdkit`;
this finds it: installed, or in the checkout that this file is in.
"""

import os
import sys

try:
    import nbdserve  # noqa: F401
except ImportError:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from nbdserve.nbdkit.script import *  # noqa: F403
