#!/usr/bin/env bash
# Installs the programs of others that the tests and the benchmarks work with: Debian packages.
#
# All there: says nothing and is quick, for every `make test` runs this.  Something missing:
# installs it where it may (root, or sudo without a password); else says aloud what is missing
# and which test files will skip tests.  With CI=true a missing peer is a failure: a run that
# skips must not look like a run that passed.
set -eu
cd "$(dirname "$0")/.."
. tools/apt.sh

# The peer as tests name it in @pytest.mark.peer, and the package it comes from.  guest-kernel is a
# Debian kernel, fetched by a tool of its own and not installed.
PEERS="
qemu-img        qemu-utils
qemu-io         qemu-utils
qemu-nbd        qemu-utils
nbdkit          nbdkit
nbdkit-python   nbdkit-plugin-python
python3-trio    python3-trio
python3-trio    python3-construct
nbdinfo         libnbd-bin
nbdcopy         libnbd-bin
nbdfuse         libnbd-bin
python3-libnbd  python3-libnbd
nbd-client      nbd-client
fio             fio
strace          strace
losetup         mount
setpriv         util-linux
qemu-system-x86_64  qemu-system-x86
busybox         busybox-static
mkfs.xfs        xfsprogs
mke2fs          e2fsprogs
debugfs         e2fsprogs
fuse2fs         fuse2fs
systemd-analyze systemd
guest-kernel    -
"

# nbd-client is in /usr/sbin, which is not on every user's PATH.
PATH="$PATH:/usr/sbin:/sbin"

present() {
    case "$1" in
        # A module of Debian's own Python, invisible to a virtual environment.
        python3-libnbd) /usr/bin/python3 -I -c 'import nbd' 2>/dev/null ;;
        python3-trio) /usr/bin/python3 -I -c 'import trio, construct' 2>/dev/null ;;
        nbdkit-python) nbdkit --dump-plugin python >/dev/null 2>&1 ;;
        guest-kernel) [ -e build/kernel/default/vmlinuz ] ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

missing() {  # prints "peer package" lines
    local peer package
    while read -r peer package; do
        [ -z "$peer" ] || present "$peer" || echo "$peer $package"
    done <<<"$PEERS"
}

lacking=$(missing)
[ -n "$lacking" ] || exit 0

packages() {  # of the lines on stdin
    cut -d' ' -f2 | grep -vx -e - | sort -u
}

# shellcheck disable=SC2046  # package names are words
apt_install $(packages <<<"$lacking") || true
! grep -q guest-kernel <<<"$lacking" || tools/guest-kernel.sh >/dev/null || true

lacking=$(missing)
[ -n "$lacking" ] || exit 0

{
    echo "*** Missing programs that tests and benchmarks use, and not installed:"
    while read -r peer package; do
        [ "$package" != - ] || package='fetched by tools/guest-kernel.sh'
        files=$(grep -rlzE --include='test_*.py' --include=guest.py "mark\.peer\([^)]*\"$peer\"" tests | sort | tr '\n' ' ')
        echo "***   $peer (Debian: $package); skips tests in: ${files:-no file}"
    done <<<"$lacking"
    # shellcheck disable=SC2046
    echo "*** To have them: sudo apt-get install" $(packages <<<"$lacking")
} >&2

if [ "${CI:-}" = true ]; then
    echo "*** CI=true: a missing program is a failure." >&2
    exit 1
fi
