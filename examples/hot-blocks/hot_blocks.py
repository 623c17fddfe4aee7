"""The filter driver hot-blocks: which blocks of a disk are read and written most.

nbdserve serve -v --image-opts driver=hot-blocks,file.driver=qcow2,file.file.filename=X

logs them at the end, and whenever it gets SIGUSR1.
"""

from collections import Counter

from nbdserve.block.filter import FilterNode
from nbdserve.units import parse_size


class HotBlocks(FilterNode):
    def __init__(self, file, block_size="64k", top="10") -> None:
        super().__init__(file)
        self.block_size = max(1, parse_size(str(block_size), "block-size"))
        self.top = int(top)
        self.counts = {"read": Counter(), "written": Counter()}

    def count(self, what, offset, length) -> None:
        first, last = offset // self.block_size, (offset + length - 1) // self.block_size
        self.counts[what].update(range(first, last + 1))

    async def read(self, offset, buffer) -> None:
        await super().read(offset, buffer)
        self.count("read", offset, len(buffer))  # if it succeeded

    async def write(self, offset, data) -> None:
        await super().write(offset, data)
        self.count("written", offset, len(data))

    def statistics(self):
        """{"read": {offset: requests, ...}, "written": ...}, the hottest blocks first."""
        return {what: {str(block * self.block_size): requests
                       for block, requests in counts.most_common(self.top)}
                for what, counts in self.counts.items()}
