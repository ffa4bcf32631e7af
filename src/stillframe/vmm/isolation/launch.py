"""A program of its own: enters a private file tree, a private network, and becomes the VMM.

    python -I -S launch.py [console FILE] [network SLIRP4NETNS TAP] [tree ROOT SCRATCH_BYTES]
        [ro|rw NAME_INSIDE PATH_OUTSIDE] ... [link NAME_INSIDE TARGET] ...
        -- PROGRAM NAME ARGUMENT ...

``console`` is the file that standard output is appended to. ``NAME`` is argument 0 of the program.
Imports nothing of ours: every module imported here would delay every start by milliseconds, so
there is no parser, no socket and no pathlib.

**tree**: The VMM sees nothing of this host but the files of its VM, each under a name that is the
same in every VM. So no path that it writes into device state can lead to another VM's files, and
device state from elsewhere that names other paths finds nothing there. ``ROOT`` is the directory
that host and VMM share. The steps are those of pivot_root(2) for a new root that nobody else sees:
the file tree ends with its last process.

**network**: A network namespace with a bridge (``br``) between two tap devices: ``TAP``, which the
VMM opens by its name and without any privilege, and ``slirp0``, which slirp4netns(1) serves from
the network that we were started in. Names and addresses are the same in every VM, and nobody else
sees them. slirp4netns ends when the last copy of a pipe's end closes that only the VMM has, so
neither is ever left without the other's master, whoever is killed when.

As an ordinary user all this takes a user namespace in which we are root over what is ours
(user_namespaces(7)); as root none. All capabilities are given up in either case.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys

_NEW_MOUNTS, _NEW_USER, _NEW_NETWORK = 0x20000, 0x10000000, 0x40000000  # linux/sched.h
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18  # linux/mount.h
_DETACH = 2  # MNT_DETACH
_DROP_BOUND, _NO_NEW_PRIVILEGES = 24, 38  # PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS; linux/prctl.h
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # its number, for want of a function in libc
_LAST_CAPABILITY = 63
# What statvfs(3) calls a mount's flags -> mount(2): a remount has to keep those that are locked.
_KEPT_FLAGS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
# linux/if_tun.h: requests, and IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, as the VMMs open it.
_TUN_SET_DEVICE, _TUN_SET_PERSISTENT, _TUN_SET_OWNER = 0x400454CA, 0x400454CB, 0x400454CC
_TAP_FLAGS = 0x0002 | 0x1000 | 0x4000
# linux/sockios.h
_GET_FLAGS, _SET_FLAGS, _GET_INDEX, _ADD_BRIDGE, _ADD_PORT = 0x8913, 0x8914, 0x8933, 0x89A0, 0x89A2
_UP = 1  # IFF_UP
_BRIDGE, _UPLINK = "br", "slirp0"
# Kernel parameters (ip-sysctl): no neighbour discovery, no report that the bridge is a snooper.
_SILENT = (("ipv6/conf/default/disable_ipv6", "1"), ("ipv4/igmp_link_local_mcast_reports", "0"))
_WORDS = 4096  # bytes of what slirp4netns says when it cannot start
_VALUES = {"console": 1, "network": 2, "tree": 2, "ro": 2, "rw": 2, "link": 2}  # of each word
_ENTRIES = ("ro", "rw", "link")
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Making:
    """Has what fails within it said in one line, and ends this process with 1."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError):
            print(f"no {self._what}: {error.strerror or error}", file=sys.stderr)
            sys.exit(1)


def _must(result: int, doing: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")
    return result


def _own_namespaces(kinds: int) -> None:
    user, group = os.geteuid(), os.getegid()
    _must(_LIBC.unshare(kinds | (_NEW_USER if user else 0)), "unshare")
    if user:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(line)


# -- the file tree -----------------------------------------------------------------------------


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    done = _LIBC.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags),
        options.encode(),
    )  # fmt: skip
    _must(done, f"mount {source} at {target}")


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


def _enter(root: str, scratch_bytes: str, entries: list[list[str]]) -> None:
    """Mount an empty file system, bind into it what is named, and make it the root."""
    _mount("none", "/", "", _RECURSIVE | _PRIVATE)
    shared = os.open(root, os.O_PATH | os.O_DIRECTORY)
    _mount("none", root, "tmpfs", 0, f"mode=700,size={scratch_bytes}")
    os.mkdir(f"{root}/run", 0o700)  # noqa: PTH102
    # The directory that the file system has just hidden: host and VMM share it.
    _mount(f"/proc/self/fd/{shared}", f"{root}/run", "", _BIND)
    os.close(shared)
    os.mkdir(f"{root}/scratch", 0o700)  # noqa: PTH102
    for kind, name, outside in entries:
        if kind == "link":
            os.symlink(outside, root + name)  # noqa: PTH211
        else:
            _bind(outside, root + name, readonly=kind == "ro")
    os.chdir(root)
    _must(_LIBC.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _must(_LIBC.umount2(b".", _DETACH), "umount")
    os.chdir("/")


# -- the network -------------------------------------------------------------------------------


class _Uplink:
    """slirp4netns, a child that stays in the network which we leave."""

    def __init__(self, program: str) -> None:
        """Fork it. It waits until ``open``, and ends when we do (whatever we are by then)."""
        told, self._tell = os.pipe()
        self._ready, readied = os.pipe()
        self._said, saying = os.pipe()
        gone, living = os.pipe()
        parent = os.getpid()
        if os.fork() == 0:
            try:
                _serve(program, parent, told=told, readied=readied, saying=saying, gone=gone)
            except OSError as error:
                os.write(2, f"{program}: {error.strerror or error}\n".encode())
            finally:
                os._exit(1)
        for end in (told, readied, saying, gone):
            os.close(end)
        # Nobody ever writes to it. It is the one descriptor that the VMM inherits from here.
        os.set_inheritable(living, True)

    def open(self) -> None:
        """Tell it that we have left: it opens its device in the network that we have now."""
        os.write(self._tell, b"!")
        os.close(self._tell)

    def wait(self) -> None:
        """Return when its device is there. Raises OSError with what it said when it ended."""
        if os.read(self._ready, 1) != b"1":
            lines = os.read(self._said, _WORDS).decode(errors="replace").splitlines()
            # It tells of the descriptor that it hands itself, too.
            said = [line for line in lines if "tapfd=" not in line]
            raise OSError(0, f"slirp4netns: {'; '.join(said) or 'it ended without a word'}")
        os.close(self._ready)
        os.close(self._said)  # what it says later has no reader, which it does not mind


def _serve(
    program: str, parent: int, *, told: int, readied: int, saying: int, gone: int
) -> None:  # pragma: no cover - another process
    """Become slirp4netns for the network of ``parent``, once told that it has one."""
    os.dup2(saying, 2)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    # Nothing of the VMM's: its sockets, and the other ends of our pipes.
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if number not in (0, 1, 2, told, readied, gone):
            _LIBC.close(number)  # no error for the one that listed them
    if not os.read(told, 1):
        os._exit(0)
    network = os.open(f"/proc/{parent}/ns/net", os.O_RDONLY)
    user = os.open(f"/proc/{parent}/ns/user", os.O_RDONLY)
    if os.getppid() != parent:
        os._exit(0)  # it has ended, and its number may be another's by now
    if os.geteuid():
        _must(_LIBC.setns(user, _NEW_USER), "setns")
    for kept in (network, readied, gone):
        os.set_inheritable(kept, True)
    os.execv(  # noqa: S606 - an argument list
        program,
        [
            "slirp4netns", "--netns-type=path", f"--exit-fd={gone}", f"--ready-fd={readied}",
            "--enable-sandbox", "--enable-seccomp", f"/proc/self/fd/{network}", _UPLINK,
        ],
    )  # fmt: skip


class _Switch:
    """The bridge. Raises OSError."""

    def __init__(self) -> None:
        self._socket = _must(_LIBC.socket(2, 2, 0), "socket")  # AF_INET, SOCK_DGRAM
        self._ask(_ADD_BRIDGE, _BRIDGE)
        self._raise(_BRIDGE)

    def add(self, device: str) -> None:
        """Make a device one of its ports."""
        index = self._ask(_GET_INDEX, device)[16:20]
        self._ask(_ADD_PORT, _BRIDGE, index)
        self._raise(device)

    def _raise(self, device: str) -> None:
        (flags,) = struct.unpack_from("H", self._ask(_GET_FLAGS, device), 16)
        self._ask(_SET_FLAGS, device, struct.pack("H", flags | _UP))

    def _ask(self, request: int, device: str, value: bytes = b"") -> bytes:
        asked = struct.pack("16s24s", device.encode(), value)  # struct ifreq, netdevice(7)
        try:
            return fcntl.ioctl(self._socket, request, asked)
        except OSError as error:
            raise OSError(error.errno, f"{device}: {error.strerror}") from error


def _make_tap(name: str) -> None:
    """A device that stays until its network ends, for whoever we are."""
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(device, _TUN_SET_DEVICE, struct.pack("16sH22x", name.encode(), _TAP_FLAGS))
        fcntl.ioctl(device, _TUN_SET_OWNER, os.geteuid())
        fcntl.ioctl(device, _TUN_SET_PERSISTENT, 1)
    except OSError as error:
        raise OSError(error.errno, f"/dev/net/tun: {error.strerror}") from error
    os.close(device)


def _silence() -> None:
    """Have this host send nothing of its own into the VM's network as its devices rise."""
    for name, value in _SILENT:
        try:
            with open(f"/proc/sys/net/{name}", "w") as file:  # noqa: PTH123
                file.write(value)
        except OSError:
            pass  # not in this kernel; or a container, where some frames that nobody answers go out


# -- both --------------------------------------------------------------------------------------


def _give_up_capabilities() -> None:
    for capability in range(_LAST_CAPABILITY + 1):
        _LIBC.prctl(_DROP_BOUND, capability, 0, 0, 0)  # above the kernel's last one: EINVAL
    _must(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")


def _launch(words: dict[str, list[str]], entries: list[list[str]], command: list[str]) -> None:
    tree, network = words.get("tree"), words.get("network")
    with _Making("private network" if network else "private file tree"):
        uplink = _Uplink(network[0]) if network else None
        _own_namespaces((_NEW_MOUNTS if tree else 0) | (_NEW_NETWORK if network else 0))
        if network and uplink:
            _silence()
            uplink.open()
            _make_tap(network[1])
            switch = _Switch()
            switch.add(network[1])
    if tree:
        with _Making("private file tree"):
            _enter(tree[0], tree[1], entries)  # meanwhile slirp4netns starts
    if uplink:
        with _Making("private network"):
            uplink.wait()
            switch.add(_UPLINK)
    with _Making(command[0]):
        _give_up_capabilities()
        os.execvp(command[0], command[1:])  # noqa: S606 - an argument list


def main() -> None:
    """Do as the arguments say. What fails is said in one line, and ends this process with 1."""
    split = sys.argv.index("--")
    told, entries = sys.argv[1:split], []
    words: dict[str, list[str]] = {}
    while told:
        word, end = told[0], 1 + _VALUES[told[0]]
        if word in _ENTRIES:
            entries.append(told[:end])
        else:
            words[word] = told[1:end]
        told = told[end:]
    if "console" in words:
        with _Making("console"):
            output = os.open(words["console"][0], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.close(output)
    _launch(words, entries, sys.argv[split + 1 :])


if __name__ == "__main__":
    main()
