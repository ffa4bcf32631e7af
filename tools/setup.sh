#!/usr/bin/env bash
# Make this checkout ready to run: packages, Python environment, guest kernel, guest agent.
# Idempotent: each step looks first whether its result is there already (a second run takes seconds).
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE=.cache
STAMPS=$CACHE/stamps
mkdir -p "$STAMPS"

PACKAGES=(
    qemu-system-x86 qemu-utils          # the hypervisor
    slirp4netns                         # the network of guests under the other hypervisors
    busybox-static squashfs-tools e2fsprogs  # images and disks
    xfsprogs                            # a file system that shares blocks, for tests and figures
    musl-tools gcc make                 # the guest agent
    python3-venv                        # the Python environment
    skopeo docker-registry mmdebstrap   # the tests' other side
    cpio strace zstd lz4
)

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s (hint: %s)\n' "$1" "$2" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else fail "root is needed for: $*" "run that command as root, then make setup again"
    fi
}

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

update_lists() {
    [ -n "${LISTS_ARE_NEW:-}" ] && return
    say "fetching package lists"
    as_root apt-get -qq update
    LISTS_ARE_NEW=1
}

install_packages() {
    local missing=() package
    for package in "${PACKAGES[@]}"; do installed "$package" || missing+=("$package"); done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null ||
        fail "not a Debian system; missing: ${missing[*]}" "install their equivalents by hand"
    say "installing ${missing[*]}"
    # Packages such as docker-registry start a service when installed; we want the program only.
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
        made=1
        trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y
        --no-install-recommends "${missing[@]}")
    if ! as_root "${install[@]}"; then
        update_lists
        as_root "${install[@]}"
    fi
    if [ -n "$made" ]; then
        as_root rm -f "$policy"
        trap - EXIT
    fi
    # It is enabled by its package all the same; the next boot must not start it either.
    if [[ " ${missing[*]} " == *" docker-registry "* ]] && command -v systemctl >/dev/null; then
        as_root systemctl disable docker-registry.service >/dev/null 2>&1 || true
    fi
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
        then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found" "install one, or set PYTHON to it"
}

make_environment() {
    local key
    key=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)
    if .venv/bin/python -c 'import stillframe' 2>/dev/null &&
        [ "$(cat "$STAMPS/venv" 2>/dev/null)" = "$key" ]; then return; fi
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        local python
        python=$(find_python)
        say "making .venv with $python"
        "$python" -m venv --clear .venv
    fi
    say "installing Python packages"
    local pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check install)
    "${pip[@]}" --require-virtualenv -r requirements.lock
    "${pip[@]}" --require-virtualenv --no-deps --editable .
    echo "$key" >"$STAMPS/venv"
}

kernel_package() {
    apt-cache depends "linux-image-cloud-$(dpkg --print-architecture)" 2>/dev/null |
        awk '/Depends: linux-image-[0-9]/ {print $2; exit}'
}

unpack_kernel() {
    if compgen -G "$CACHE/kernel/boot/vmlinuz-*" >/dev/null; then return; fi
    local package
    package=$(kernel_package)
    if [ -z "$package" ]; then update_lists; package=$(kernel_package); fi
    [ -n "$package" ] || fail "no linux-image-cloud package for this machine" "see apt-cache policy"
    say "unpacking $package (it is not installed)"
    local beside=$CACHE/kernel.new
    rm -rf "$beside" "$CACHE/download"
    mkdir -p "$beside" "$CACHE/download"
    # As root, apt drops to the user _apt, which may not write here, and warns; say who downloads.
    local options=()
    [ "$(id -u)" = 0 ] && options=(-o APT::Sandbox::User=root)
    if ! (cd "$CACHE/download" && apt-get -qq "${options[@]}" download "$package"); then
        update_lists
        (cd "$CACHE/download" && apt-get -qq "${options[@]}" download "$(kernel_package)")
    fi
    dpkg-deb -x "$CACHE"/download/linux-image-*.deb "$beside"
    rm -rf "$CACHE/download" "$CACHE/kernel"
    mv "$beside" "$CACHE/kernel"
}

build_agent() {
    make --no-print-directory --silent -C agent
    make --no-print-directory --silent -C tracker
    [ -x agent/build/stillframe-init ] ||
        fail "agent/build/stillframe-init was not built" "run make -C agent"
}

install_packages
make_environment
unpack_kernel
build_agent
