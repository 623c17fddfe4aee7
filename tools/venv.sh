#!/usr/bin/env bash
# venv.sh DIR: makes the virtual environment DIR, with pip, whatever Python this machine has.
#
# Debian keeps ensurepip out of python3, so on a fresh machine `python3 -m venv` alone fails.
# The ways, in this order: Python's own ensurepip; the package python3-venv, where it may be
# installed; and pip's own wheel from the index, which needs no rights at all.
# PYTHON names the interpreter; else it is python3, or a newer one beside it.
set -eu
dir=$1
tools=$(cd "$(dirname "$0")" && pwd)
. "$tools/apt.sh"

if [ -x "$dir/bin/python" ] && "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_ensurepip() { "$1" -c 'import venv; from ensurepip import version' 2>/dev/null; }

python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if recent_enough "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    wanted=${PYTHON:-python3}
    found="not there"
    if command -v "$wanted" >/dev/null; then found=$("$wanted" --version 2>&1 || true); fi
    echo "nbdserve needs Python 3.11 or newer; $wanted is: $found." \
        "Name another with make PYTHON=/path/to/python3." >&2
    exit 1
fi

# --clear: what an interrupted run left has no working pip, or this line would not be reached.
if has_ensurepip "$python" || { apt_install python3-venv && has_ensurepip "$python"; }; then
    "$python" -m venv --clear "$dir"
    exit 0
fi

echo "This Python has no ensurepip, and python3-venv cannot be installed: getting pip itself."
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
if ! wheel=$("$python" "$tools/fetch_pip.py" "$wheels") ||
    ! "$python" -m venv --clear --without-pip "$dir"; then
    echo "Cannot make a virtual environment. On Debian: apt-get install python3-venv" >&2
    exit 1
fi
"$dir/bin/python" "$wheel/pip" install --quiet --no-index "$wheel"
