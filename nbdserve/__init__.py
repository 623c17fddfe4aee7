"""An NBD server for qcow2 images.

Only the version lives here.  Nothing is imported: every start of the program runs this file,
and the time from command to accepting clients is a promise.
"""

__version__ = "0.1.0"
