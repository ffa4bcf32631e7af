"""A program of its own: enters a private file tree and becomes the VMM. Imports nothing of ours.

    python -I -S jail.py ROOT SCRATCH_BYTES CONSOLE NETWORK
        [ro|rw NAME_INSIDE PATH_OUTSIDE] ... [link NAME_INSIDE TARGET] ... -- ARGUMENT ...

``ROOT`` is the directory that host and VMM share, ``CONSOLE`` the file that standard output is
appended to (or nothing), ``NETWORK`` 1 when tap devices are to be opened. Every module imported
here would delay every start by milliseconds, so there is no parser and no pathlib.

The VMM sees nothing of this host but the files of its VM, each under a name that is the same in
every VM. So no path that it writes into device state can lead to another VM's files, and device
state from elsewhere that names other paths finds nothing there.

As an ordinary user this takes a user namespace in which we are mapped to ourselves
(user_namespaces(7)); as root none, but all capabilities are given up. The steps are those of
pivot_root(2) for a new root that nobody else sees: the file tree ends with its last process.
"""

from __future__ import annotations

import ctypes
import os
import sys

_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER; linux/sched.h
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18  # linux/mount.h
_DETACH = 2  # MNT_DETACH
_DROP_BOUND, _NO_NEW_PRIVILEGES = 24, 38  # PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS; linux/prctl.h
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # its number, for want of a function in libc
_NET_ADMIN = 12  # CAP_NET_ADMIN, to open a tap device
_LAST_CAPABILITY = 63
# What statvfs(3) calls a mount's flags -> mount(2): a remount has to keep those that are locked.
_KEPT_FLAGS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_LIBC = ctypes.CDLL(None, use_errno=True)


def _must(result: int, doing: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    done = _LIBC.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags),
        options.encode(),
    )  # fmt: skip
    _must(done, f"mount {source} at {target}")


def _own_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    _must(_LIBC.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)), "unshare")
    if user:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(line)
    _mount("none", "/", "", _RECURSIVE | _PRIVATE)


def _bind(source: str, target: str, *, readonly: bool) -> None:
    if os.path.isdir(source):  # noqa: PTH112
        os.makedirs(target, exist_ok=True)  # noqa: PTH103
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    _mount(source, target, "", _BIND | _RECURSIVE)
    if readonly:
        had = os.statvfs(target).f_flag
        kept = sum(flag for bit, flag in _KEPT_FLAGS.items() if had & bit)
        _mount("none", target, "", _REMOUNT | _BIND | _READ_ONLY | kept)


def _enter(root: str, scratch_bytes: str, entries: list[str]) -> None:
    """Mount an empty file system, bind into it what is named, and make it the root."""
    shared = os.open(root, os.O_PATH | os.O_DIRECTORY)
    # By single pages, so that the extents of a file are the pages that were written to it.
    _mount("none", root, "tmpfs", 0, f"mode=700,huge=never,size={scratch_bytes}")
    os.mkdir(f"{root}/run", 0o700)  # noqa: PTH102
    # The directory that the file system has just hidden: host and VMM share it.
    _mount(f"/proc/self/fd/{shared}", f"{root}/run", "", _BIND)
    os.close(shared)
    os.mkdir(f"{root}/scratch", 0o700)  # noqa: PTH102
    for kind, name, outside in zip(entries[0::3], entries[1::3], entries[2::3], strict=True):
        if kind == "link":
            os.symlink(outside, root + name)  # noqa: PTH211
        else:
            _bind(outside, root + name, readonly=kind == "ro")
    os.chdir(root)
    _must(_LIBC.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _must(_LIBC.umount2(b".", _DETACH), "umount")
    os.chdir("/")


def _give_up_capabilities(*, network: bool) -> None:
    for capability in range(_LAST_CAPABILITY + 1):
        if not (network and capability == _NET_ADMIN):
            _LIBC.prctl(_DROP_BOUND, capability, 0, 0, 0)  # above the kernel's last one: EINVAL
    _must(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")


def main() -> None:
    """Do as the arguments say. What fails is said in one line, and ends this process with 1."""
    root, scratch_bytes, console, network, *rest = sys.argv[1:]
    split = rest.index("--")
    try:
        if console:
            output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.close(output)
        _own_namespaces()
        _enter(root, scratch_bytes, rest[:split])
        _give_up_capabilities(network=network == "1")
        os.execv("/vmm", rest[split + 1 :])  # noqa: S606 - an argument list
    except OSError as error:
        print(f"no private file tree: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
