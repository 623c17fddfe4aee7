#!/bin/bash
# qemu-img with a disk that nbdserve serves: fill it, compare, look at it, check it, copy it out.
#
# usage: qemu-img.sh RAW-IMAGE FOLDER    leaves FOLDER/disk.qcow2 and FOLDER/copy.qcow2
set -euo pipefail
source=$1 folder=$2

# --fork returns when clients are accepted, and the pid file is there.
serve() {  # IMAGE [OPTIONS]
    nbdserve serve --fork --socket="$folder/nbd.sock" --pid-file="$folder/pid" "${@:2}" -- "$1" >/dev/null
}
# When the pid file has gone the image is flushed and closed.
stop() {
    [ -e "$folder/pid" ] || return 0
    kill "$(cat "$folder/pid")"
    while [ -e "$folder/pid" ]; do sleep 0.02; done
}
trap stop EXIT
disk=nbd+unix:///?socket=$folder/nbd.sock

size=$(stat --format=%s "$source")
nbdserve create "$folder/disk.qcow2" "$size"
serve "$folder/disk.qcow2"

# -n: the disk is there, do not create it. It is new, so where the source is zero it is too.
qemu-img convert -n --target-is-zero -f raw -O raw "$source" "$disk"
qemu-img compare -f raw -F raw "$source" "$disk"
qemu-img info -f raw "$disk"
# What the disk has data for: NBD's block status.
qemu-img map -f raw --output=json "$disk"
qemu-img convert -c -f raw -O qcow2 "$disk" "$folder/copy.qcow2"
stop

# A check is of the image, not of the disk in it: so the image's file is what is served.
serve "$folder/disk.qcow2" --format=raw --read-only
qemu-img check -f qcow2 "$disk"
