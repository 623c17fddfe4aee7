#!/bin/bash
# A disk that somebody may spoil: an image behind nbdkit, with nbdkit's filters in front of it.
#
# usage: overlay.sh IMAGE COMMAND    COMMAND has the disk as $uri; IMAGE is not changed
set -euo pipefail

# cow: what is written goes into a temporary file of nbdkit's. rate: 1 Gbit/s for each connection,
# as from a network. The rest is nbdserve's: the image, read past the page cache if it can be.
exec nbdserve nbdkit --filter=rate --filter=cow --run "$2" \
    "$1" cache=auto rate=1G
