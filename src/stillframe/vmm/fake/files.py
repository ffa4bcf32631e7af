"""The file tree of a fake guest, kept on its overlay disk, so that it is captured with the disk.

Layout, after the first MiB (which holds the empty ext4 file system the host made): a MiB of
index (magic, u32 length, JSON), then file bytes, appended and never reused.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import time
from collections.abc import Iterator

_MAGIC = b"FAKEFS-1"
_INDEX = 1 << 20
_DATA = 2 << 20
_PIECE = 32768
_MAX_LINKS = 40
Node = dict[str, object]
_DIRECTORIES = ("", "/bin", "/etc", "/root", "/tmp", "/var")  # noqa: S108 - inside the guest


class FileTree:
    """Directories, files and symbolic links by absolute path ("" is the root)."""

    def __init__(self, disk: str | None) -> None:
        self._fd = -1 if disk is None else os.open(disk, os.O_RDWR | os.O_CLOEXEC)
        self._size = 0 if disk is None else os.fstat(self._fd).st_size
        self._nodes: dict[str, Node] = {}
        self._end = _DATA
        self._load()

    def _load(self) -> None:
        head = os.pread(self._fd, 12, _INDEX) if self._fd >= 0 else b""
        if head[:8] == _MAGIC:
            (length,) = struct.unpack("<I", head[8:])
            kept = json.loads(os.pread(self._fd, length, _INDEX + 12))
            self._nodes, self._end = kept["nodes"], kept["end"]
            return
        for path in _DIRECTORIES:
            self._nodes[path] = _node("dir", 0o1777 if path == "/tmp" else 0o755)  # noqa: S108
        self._nodes["/etc/os-release"] = _node("link", 0o777, target="../usr/lib/os-release")

    def _save(self) -> None:
        body = json.dumps({"nodes": self._nodes, "end": self._end}).encode()
        if self._fd < 0 or len(body) + 12 > _DATA - _INDEX or self._size < _DATA:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.pwrite(self._fd, _MAGIC + struct.pack("<I", len(body)) + body, _INDEX)

    def resolve(self, path: str, *, follow: bool) -> str:
        """The path with links resolved (the last one only with ``follow``). Raises OSError."""
        todo, done, links = path.split("/")[::-1], "", 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                done = done.rpartition("/")[0]
                continue
            node = self._nodes.get(f"{done}/{part}")
            if node is None or node["type"] != "link" or (not todo and not follow):
                done += f"/{part}"
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = str(node["target"])
            done = "" if target.startswith("/") else done
            todo += target.split("/")[::-1]
        return done

    def stat(self, path: str, *, follow: bool) -> dict[str, str]:
        """The fields of STAT (mode octal), empty when nothing is there."""
        node = self._nodes.get(self.resolve(path, follow=follow))
        if node is None:
            return {}
        fields = {key: str(node[key]) for key in ("type", "size", "mtime", "uid", "gid")}
        fields["mode"] = f"{node['mode']:o}"
        if node["type"] == "link":
            fields["target"] = str(node["target"])
        return fields

    def content(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, in parts. Raises OSError."""
        node = self._nodes.get(self.resolve(path, follow=True))
        if node is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if node["type"] == "dir":
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        extents = node["extents"]
        assert isinstance(extents, list)  # noqa: S101 - for the type checker
        for start, length in extents:
            for offset in range(0, length, _PIECE):
                yield os.pread(self._fd, min(_PIECE, length - offset), start + offset)

    def walk(self, path: str, *, follow: bool) -> Iterator[tuple[str, str]]:
        """(relative name, absolute path) of a file, or of what lies below a directory."""
        top = self.resolve(path, follow=True)
        if top not in self._nodes:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if self._nodes[top]["type"] != "dir":
            yield path.rstrip("/").rpartition("/")[2], top
            return
        yield from self._below(top, "", follow, 0)

    def _below(self, top: str, name: str, follow: bool, depth: int) -> Iterator[tuple[str, str]]:
        for child in sorted(n for n in self._nodes if n.rpartition("/")[0] == top and n):
            relative = f"{name}{child.rpartition('/')[2]}"
            try:
                inner = self.resolve(child, follow=follow)
            except OSError:
                continue
            if inner not in self._nodes:  # a link that leads nowhere
                continue
            yield relative, inner
            if self._nodes[inner]["type"] == "dir" and depth < _MAX_LINKS:
                yield from self._below(inner, f"{relative}/", follow, depth + 1)

    def link(self, target: str, path: str) -> None:
        """Make a symbolic link. Raises OSError."""
        self._put(self.resolve(path, follow=False), _node("link", 0o777, target=target))
        self._save()

    def begin(self, path: str, *, kind: str, mode: int | None, uid: int, gid: int) -> Writer:
        """Begin to write a file or to make a directory. Raises OSError."""
        where = self.resolve(path, follow=True)
        old = self._nodes.get(where)
        if old is not None and (old["type"] == "dir") != (kind == "dir"):
            code = errno.EISDIR if kind != "dir" else errno.ENOTDIR
            raise OSError(code, os.strerror(code))
        if mode is None:
            mode = 0o755 if kind == "dir" else 0o644
        return Writer(self, where, _node(kind, mode, uid=uid, gid=gid))

    def append(self, extents: list[list[int]], data: bytes) -> None:
        """Store bytes behind the others and note where. Raises OSError (ENOSPC)."""
        if self._fd < 0 or self._end + len(data) > self._size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.pwrite(self._fd, data, self._end)
        if extents and sum(extents[-1]) == self._end:
            extents[-1][1] += len(data)
        else:
            extents.append([self._end, len(data)])
        self._end += len(data)

    def put(self, path: str, node: Node) -> None:
        """Give a node its name, with missing parents. Raises OSError."""
        self._put(path, node)
        self._save()

    def _put(self, path: str, node: Node) -> None:
        parent = path.rpartition("/")[0]
        above = self._nodes.get(parent)
        if above is None:
            self._put(parent, _node("dir", 0o755))
        elif above["type"] != "dir":
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self._nodes[path] = node


class Writer:
    """One WRITE: the name appears with ``finish``. ``size`` is the bytes so far."""

    def __init__(self, tree: FileTree, path: str, node: Node) -> None:
        self._tree, self._path, self._node = tree, path, node
        self._extents: list[list[int]] = []
        self.size = 0

    def add(self, data: bytes) -> None:
        """More bytes of the file. Raises OSError."""
        self._tree.append(self._extents, data)
        self.size += len(data)

    def finish(self) -> None:
        """Make it visible. Raises OSError."""
        if self._node["type"] == "file":
            self._node["extents"], self._node["size"] = self._extents, self.size
        self._tree.put(self._path, self._node)


def _node(kind: str, mode: int, *, uid: int = 0, gid: int = 0, target: str = "") -> Node:
    return {
        "type": kind, "mode": mode, "uid": uid, "gid": gid, "size": 0,
        "mtime": int(time.time()), "target": target, "extents": [],
    }  # fmt: skip
