#!/usr/bin/env bash
# Fetches a Debian kernel for the guest of tests/kernel into build/kernel/VERSION: vmlinuz and
# modules/.  The package is downloaded and unpacked, never installed: nothing of this machine's
# own boot changes, and no root is needed.
#
#   tools/guest-kernel.sh [PACKAGE]     PACKAGE: a kernel, or a meta package that depends on one
#
# Prints the folder.  build/kernel/default is a link to the last one fetched without PACKAGE.
# A kernel that is there already is not fetched again; which one a meta package names moves with
# security updates, so it is asked each time a PACKAGE is named and else only once.
set -eu
cd "$(dirname "$0")/.."

cache=build/kernel
named=${1:-}
if [ -z "$named" ] && [ -e "$cache/default/vmlinuz" ]; then
    readlink -f "$cache/default"
    exit 0
fi

fail() {
    echo "guest-kernel: $*" >&2
    exit 1
}

for tool in apt-cache apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "$tool is not here: the guest's kernel is a Debian package"
done
meta=${named:-linux-image-cloud-amd64}
shown=$(apt-cache show --no-all-versions "$meta" 2>/dev/null) || true
[ -n "$shown" ] || fail "apt knows no package $meta (apt-get update?)"
package=$(sed -n 's/^Depends:.*\(linux-image-[0-9][^ ,]*\).*/\1/p' <<<"$shown" | head -n 1)
package=${package:-$meta}
version=${package#linux-image-}
folder=$cache/$version

if [ ! -e "$folder/vmlinuz" ]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2) || fail "cannot download $package"
    dpkg -x "$work"/*.deb "$work/root"
    mkdir "$work/made"
    mv "$work/root/boot/vmlinuz-$version" "$work/made/vmlinuz"
    # Since Debian 13 /lib is a link that the package leaves to others.
    for lib in lib usr/lib; do
        [ ! -d "$work/root/$lib/modules/$version" ] ||
            mv "$work/root/$lib/modules/$version" "$work/made/modules"
    done
    rm -rf "$folder"
    mv "$work/made" "$folder"
fi
[ -n "$named" ] || ln -sfn "$version" "$cache/default"
readlink -f "$folder"
