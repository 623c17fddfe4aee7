"""A ledger on a block device: entries are appended, and are there for good once that returns."""

from ledger.book import Ledger
from ledger.device import Device, DeviceError

__all__ = ["Device", "DeviceError", "Ledger"]
