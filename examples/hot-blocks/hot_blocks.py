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
        self.reads, self.writes = Counter(), Counter()

    async def read(self, offset, buffer) -> None:
        await super().read(offset, buffer)
        self.reads.update(self.blocks(offset, len(buffer)))  # if it succeeded

    async def write(self, offset, data) -> None:
        await super().write(offset, data)
        self.writes.update(self.blocks(offset, len(data)))

    def blocks(self, offset, length):
        return range(offset // self.block_size, (offset + length - 1) // self.block_size + 1)

    def hottest(self, requests):
        return {str(block * self.block_size): n for block, n in requests.most_common(self.top)}

    def statistics(self):
        return {"read": self.hottest(self.reads), "written": self.hottest(self.writes)}
