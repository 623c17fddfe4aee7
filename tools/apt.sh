# Sourced by the other tools: installs Debian packages where this user may.
#
# apt_install [PACKAGE...]   0: installed, and apt's lists are new; 1: this machine has no apt-get,
#                            or the user is neither root nor allowed sudo without a password, or
#                            apt-get failed.
# It never asks anything: what cannot be had without a question is the caller's to report.

apt_install() {
    command -v apt-get >/dev/null || return 1
    local -a as_root=(env DEBIAN_FRONTEND=noninteractive)
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n "${as_root[@]}")
    fi
    [ $# -eq 0 ] || echo "Installing with apt-get: $*"
    # One dead source must not stop the others: whether the packages are there, install decides.
    "${as_root[@]}" apt-get -qq update || true
    "${as_root[@]}" apt-get -qq -o Dpkg::Use-Pty=0 install --yes --no-install-recommends "$@" \
        >/dev/null
}
