#!/bin/sh
# Unpacks Debian's kernel package for the guests of the VM lab, without installing it:
#   scripts/guest-kernel.sh [cloud-amd64|amd64] [DIRECTORY]
# The flavour "cloud" is small and boots fast; "amd64" has a driver for SATA disks too.
# The directory is where flimcd looks by itself, unless FLIMCD_GUEST_KERNEL names another one.
set -eu
flavour=${1:-cloud-amd64}
to=${2:-${XDG_CACHE_HOME:-$HOME/.cache}/flimcd/guest-kernel}
package=$(apt-cache depends "linux-image-$flavour" | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
[ -n "$package" ] || { echo "apt knows no linux-image-$flavour; run apt-get update" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download "$package")
mkdir -p "$to"
dpkg-deb -x "$work"/*.deb "$to"
echo "$package is in $to"
