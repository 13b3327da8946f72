#!/usr/bin/env bash
# Installs what Powercut needs: a few system packages, and a virtual environment in .venv.
#
# Looks first, prints what it will install, then installs only that. Run again, it has nothing to do. Where it
# may not install system packages, it prints the one line to run by hand, says what is left out, and goes on.
# Exit code 0 as long as the Python part works.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/setup.stamp
GIVEN_UP=$VENV/setup.given-up # the system packages that could not be installed last time

say() { printf 'setup: %s\n' "$*"; }
have() { command -v "$1" >/dev/null 2>&1; }
limited() { if have timeout; then timeout "$@"; else shift && "$@"; fi; }

# retry LIMIT COMMAND...: up to three times, each ended after LIMIT seconds
retry() {
    local limit=$1 try
    shift
    for try in 1 2 3; do
        limited "$limit" "$@" </dev/null && return 0
        say "attempt $try of 3 failed: $*"
        ((try == 3)) || sleep $((try * 5))
    done
    return 1
}

# ---- look ------------------------------------------------------------------------------------------------

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        # Run it: the name alone may be a shim for a version that is not installed, and it may be .venv's own.
        "$name" -c 'import os, sys; print(os.path.realpath(sys._base_executable)) if sys.version_info >= (3, 11) else sys.exit(1)' 2>/dev/null &&
            return 0
    done
    return 1
}

find_manager() {
    local name
    for name in apt-get dnf pacman zypper; do
        if have "$name"; then echo "$name" && return 0; fi
    done
    echo none
}

# The package of each manager that brings a thing. Tried on Debian 12; the names for the other managers were not tried.
package() {
    case $1:$manager in
        python:apt-get) if have python3; then echo python3.11; else echo python3; fi ;;
        python:dnf) echo python3.11 ;;
        python:pacman) echo python ;;
        python:zypper) echo python311 ;;
        venv:apt-get)
            if [[ $python ]]; then
                "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
            else
                echo "$(package python)-venv"
            fi ;;
        system:apt-get | system:pacman) echo qemu-system-x86 ;;
        system:dnf) echo qemu-system-x86-core ;;
        system:zypper) echo qemu-x86 ;;
        tools:apt-get) echo qemu-utils ;;
        tools:dnf | tools:pacman) echo qemu-img ;;
        tools:zypper) echo qemu-tools ;;
        daemon:apt-get) echo qemu-system-common ;;
        daemon:dnf) echo qemu-img ;;
        daemon:pacman | daemon:zypper) echo qemu-tools ;;
        cc:apt-get) echo gcc libc6-dev ;;
        cc:dnf) echo gcc glibc-devel ;;
        cc:pacman) echo gcc ;;
        cc:zypper) echo gcc glibc-devel ;;
        xfs:*) echo xfsprogs ;;
        fuse:*) echo fuse3 ;;
        btrfs:apt-get | btrfs:pacman | btrfs:dnf) echo btrfs-progs ;;
        btrfs:zypper) echo btrfsprogs ;;
    esac
}

# A compiler that can also link: headers and the C library's start files are packages of their own.
have_cc() { have cc && echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1 && [[ -e $(cc -print-file-name=crt1.o) ]]; }

missing=() packages=()
need() {
    local thing=$1 name
    missing+=("$2")
    for name in $(package "$thing"); do
        case " ${packages[*]-} " in *" $name "*) ;; *) packages+=("$name") ;; esac
    done
}

look() {
    missing=() packages=()
    python=$(find_python) || python=
    if [[ -z $python ]]; then
        need python "Python 3.11 or newer"
        [[ $manager == apt-get ]] && need venv "Python's venv"
    elif [[ ! -e $STAMP ]] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        need venv "Python's venv (without it there is no $VENV)"
    fi
    have qemu-system-x86_64 || need system "qemu-system-x86_64 (without it: no guests)"
    { have qemu-img && have qemu-io; } || need tools "qemu-img and qemu-io (without them: no recording from QEMU, no comparison with its checker)"
    have qemu-storage-daemon || need daemon "qemu-storage-daemon (without it: no recording from QEMU)"
    have mkfs.xfs || need xfs "mkfs.xfs (without it: no tests on XFS)"
    have mkfs.btrfs || need btrfs "mkfs.btrfs (without it: no tests on btrfs)"
    have fusermount3 || need fuse "fuse3 (without it: no checkers of several files)"
    have_cc || need cc "a C compiler (without it: no guest programs are built)"
}

# ---- system packages -------------------------------------------------------------------------------------

install_line() {
    case $manager in
        apt-get) echo "apt-get install -y --no-install-recommends ${packages[*]}" ;;
        dnf) echo "dnf install -y ${packages[*]}" ;;
        pacman) echo "pacman -S --noconfirm --needed ${packages[*]}" ;;
        zypper) echo "zypper --non-interactive install ${packages[*]}" ;;
    esac
}

# How to become root, or false. Root itself gets an empty answer.
may_install() {
    sudo=
    ((EUID == 0)) || { have sudo && sudo -n true 2>/dev/null && sudo="sudo -n"; }
}

# shellcheck disable=SC2086,SC2046 # words are meant to be split
install_packages() {
    local options=
    if [[ $manager == apt-get ]]; then
        options="-qq -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 -o DPkg::Lock::Timeout=120"
        # One broken source among several fails the update, and what is needed may still be there.
        retry 300 $sudo apt-get $options update || say "going on with the package lists as they are"
    fi
    retry 1200 $sudo env DEBIAN_FRONTEND=noninteractive $(install_line) $options || return 1
    hash -r
    look
    ((${#missing[@]} == 0))
}

# ---- Python ----------------------------------------------------------------------------------------------

# What .venv was made from. A change of the first line makes it anew, a change of the second installs again.
recipe() {
    { printf '%s\n' "$PWD" "$python" && "$python" -VV; } | cksum
    cat pyproject.toml constraints.txt scripts/setup.sh | cksum
}

make_venv() {
    local pip
    if [[ ! -e $STAMP || $(head -n 1 "$STAMP") != "$(head -n 1 <<<"$recipe")" ]]; then
        rm -rf "$VENV"
        "$python" -m venv --without-pip "$VENV"
    fi
    rm -f "$STAMP"
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip --default-pip >/dev/null 2>&1; then
        pip=("$VENV/bin/python" -m pip)
    elif "$python" -m pip --version >/dev/null 2>&1; then # no ensurepip, as on a Debian without python3-venv
        pip=("$python" -m pip --python "$VENV/bin/python")
    else
        say "this Python has neither ensurepip nor pip"
        return 1
    fi
    pip+=(--disable-pip-version-check --quiet --retries 5 --timeout 60 install --constraint constraints.txt)
    # The build backend goes in first, and builds without isolation: else its version would not be under constraints.txt.
    retry 900 "${pip[@]}" hatchling editables || return 1
    retry 900 "${pip[@]}" --no-build-isolation --editable '.[dev]' || return 1
    printf '%s\n' "$recipe" >"$STAMP"
}

# ---- the guests' kernel ----------------------------------------------------------------------------------

NO_KERNEL=$VENV/setup.no-kernel # it could not be had last time

# Into the user's cache, where powercut finds it; it is not installed.
wants_kernel() {
    [[ $manager == apt-get && (! -e $NO_KERNEL || -n ${POWERCUT_SETUP_RETRY-}) ]] &&
        ! compgen -G "${XDG_CACHE_HOME:-$HOME/.cache}/powercut/guest/kernel-*/vmlinuz" >/dev/null
}

fetch_kernel() { limited 300 "$VENV/bin/python" -c 'from powercut.guest.kernel import kernel; kernel()' 2>&1 </dev/null | tail -n 1; }

get_kernel() {
    say "fetching the kernel of the guests (a Debian package, 27 MB, unpacked into the user's cache)"
    said=$(fetch_kernel) || true
    if wants_kernel && may_install; then # no package lists, or old ones
        retry 300 $sudo apt-get -qq update || true
        said=$(fetch_kernel) || true
    fi
    if wants_kernel; then
        say "going on without guests: $said"
        touch "$NO_KERNEL"
    else
        rm -f "$NO_KERNEL"
    fi
}

# ---- the plan, then the work -----------------------------------------------------------------------------

manager=$(find_manager)
look

if ((${#missing[@]})); then
    say "missing on this machine:"
    printf 'setup:   %s\n' "${missing[@]}"
    if ((${#packages[@]} == 0)); then
        say "no package manager known here: install them by hand"
    elif ! may_install; then
        say "neither root nor sudo without a password, so run this by hand: sudo $(install_line)"
        packages=()
    elif [[ -e $GIVEN_UP && $(<"$GIVEN_UP") == "${packages[*]}" && -z ${POWERCUT_SETUP_RETRY-} ]]; then
        say "not trying again (POWERCUT_SETUP_RETRY=1 would), so run this by hand: sudo $(install_line)"
        packages=()
    else
        say "will install with $manager: ${packages[*]}"
    fi
fi
recipe=
[[ -z $python ]] || recipe=$(recipe)
if [[ -z $recipe || ! -e $STAMP || $(<"$STAMP") != "$recipe" ]]; then
    say "will install in $VENV: what pyproject.toml names, in the versions of constraints.txt"
elif ((${#missing[@]} == 0)) && ! wants_kernel; then
    say "nothing to do"
    exit 0
fi

wanted=${packages[*]-}
if [[ $wanted ]]; then
    say "installing $wanted"
    if install_packages; then
        wanted=
    else
        say "could not install all of it; run this by hand: sudo $(install_line)"
    fi
fi
((${#missing[@]} == 0)) || say "going on without what is missing"

[[ $python ]] || { say "no Python 3.11 or newer: stopping"; exit 1; }
recipe=$(recipe)
if [[ ! -e $STAMP || $(<"$STAMP") != "$recipe" ]]; then
    say "installing in $VENV, with $("$python" -V)"
    make_venv || { say "failed: $VENV is not usable"; exit 1; }
fi
[[ -z $wanted ]] || echo "$wanted" >"$GIVEN_UP"
! wants_kernel || get_kernel
say "ready"
