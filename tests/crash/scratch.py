"""Folders in memory for what must be a file for a moment."""

from __future__ import annotations

import os
import tempfile

__all__ = ["scratch"]

FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory if that can be."""
    return tempfile.TemporaryDirectory(dir=FOLDER)
