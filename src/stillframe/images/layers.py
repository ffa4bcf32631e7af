"""Merging OCI layers into one tar stream without ever touching the host's file tree.

Two passes. The first reads headers only, lowest layer first, and keeps a tree of what the image
finally holds (OCI image-spec, layer.md: whiteouts and opaque markers hide lower layers only).
The second streams the winners: directories and special files from the tree, then file contents in
the order the layers hold them, then hard links. Memory is bounded by the number of entries.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from stillframe.images.tarread import (
    MAX_ENTRIES,
    Blob,
    check_expansion,
    entries,
    reading,
    refused,
    split_path,
)

_WHITEOUT, _OPAQUE, _AUFS = ".wh.", ".wh..wh..opq", ".wh..wh."
_XATTR = "SCHILY.xattr."
_KEPT_XATTRS = ("user.", "trusted.", "security.")  # what squashfs can store
_SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_CHUNK = 1 << 20


@dataclass(slots=True, eq=False)
class _Inode:
    """One object; several names may share it."""

    kind: bytes
    layer: int
    index: int  # position of its entry in the layer
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, str] | None = None


@dataclass(slots=True, eq=False)
class _Node:
    """A name in the tree. ``layer`` is the one that set it; ``children`` only for directories."""

    inode: _Inode
    layer: int
    children: dict[str, _Node] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return self.inode.kind == tarfile.DIRTYPE


class MergedLayers:
    """The file tree several layers make together.

    Raises InvalidRequest (``invalid_layer``, naming the entry) for anything hostile or damaged.
    """

    def __init__(self, blobs: Sequence[Blob]) -> None:
        """Read all headers (pass 1). ``blobs`` run from the lowest layer up."""
        self._blobs = tuple(blobs)
        self._root = _Node(_Inode(tarfile.DIRTYPE, -1, -1), -1)
        self._entries = 0
        for number, blob in enumerate(self._blobs):
            self._read_layer(number, blob)

    def _read_layer(self, layer: int, blob: Blob) -> None:
        expanded = 0
        with reading(blob, verify=True) as archive:
            for index, info in entries(archive):
                self._entries += 1
                if self._entries > MAX_ENTRIES:
                    raise refused(f"the image has more than {MAX_ENTRIES} entries")
                if info.isreg():
                    expanded += info.size  # sparse files expand too
                    check_expansion(expanded, blob.length)
                self._apply(layer, index, info)

    def _apply(self, layer: int, index: int, info: tarfile.TarInfo) -> None:
        path = split_path(info.name)
        if not path:
            if info.isdir():
                self._root.inode = _inode(info, layer, index)
            return
        parent = self._directory(path[:-1], layer, info.name)
        name = path[-1]
        if name.startswith(_WHITEOUT):
            self._white_out(parent, name, layer, info.name)
        elif info.islnk():
            self._link(parent, name, layer, info)
        else:
            self._set(parent, name, _Node(_inode(info, layer, index), layer))

    def _directory(self, path: Sequence[str], layer: int, entry: str) -> _Node:
        node = self._root
        for part in path:
            if part.startswith(_WHITEOUT):
                raise refused(f"entry {entry[:80]!r} lies below a whiteout", entry=entry[:256])
            child = node.children.get(part)
            if child is None:  # implied by a deeper name
                child = node.children[part] = _Node(_Inode(tarfile.DIRTYPE, layer, -1), layer)
                self._entries += 1
            elif not child.is_directory:
                what = "symbolic link" if child.inode.kind == tarfile.SYMTYPE else "file"
                raise refused(f"entry {entry[:80]!r} goes through a {what}", entry=entry[:256])
            node = child
        if self._entries > MAX_ENTRIES:
            raise refused(f"the image has more than {MAX_ENTRIES} entries")
        return node

    def _white_out(self, parent: _Node, name: str, layer: int, entry: str) -> None:
        if name == _OPAQUE:
            _hide_lower_children(parent, layer)
            return
        if name.startswith(_AUFS):  # other markers of the aufs driver mean nothing here
            return
        victim = name[len(_WHITEOUT) :]
        if victim in ("", ".", ".."):
            raise refused(f"whiteout {entry[:80]!r} leaves its directory", entry=entry[:256])
        node = parent.children.get(victim)
        if node is None:
            return
        _hide_lower_children(node, layer)
        if node.layer < layer and not node.children:
            del parent.children[victim]

    def _link(self, parent: _Node, name: str, layer: int, info: tarfile.TarInfo) -> None:
        node = self._root
        for part in split_path(info.linkname):
            found = node.children.get(part) if node.is_directory else None
            if found is None:
                raise refused(
                    f"hard link {info.name[:80]!r} leads to nothing in the image",
                    entry=info.name[:256],
                    target=info.linkname[:256],
                )
            node = found
        if node.is_directory:
            raise refused(f"hard link {info.name[:80]!r} to a directory", entry=info.name[:256])
        self._set(parent, name, _Node(node.inode, layer))

    @staticmethod
    def _set(parent: _Node, name: str, node: _Node) -> None:
        old = parent.children.get(name)
        if old is not None and old.is_directory and node.is_directory:
            node.children = old.children
        parent.children[name] = node

    # -- pass 2 -----------------------------------------------------------------------------------
    def write(self, output: IO[bytes]) -> None:
        """Write the merged tree as one tar stream (pass 2), the same bytes for the same layers.

        Raises OSError from ``output``, InvalidRequest when a layer changed since pass 1.
        """
        contents: dict[tuple[int, int], tuple[str, _Inode]] = {}
        links: list[tuple[str, str, _Inode]] = []
        first: dict[int, str] = {}
        for path, inode in self._walk():
            if path and id(inode) in first:
                links.append((path, first[id(inode)], inode))
                continue
            first[id(inode)] = path
            if inode.kind == tarfile.REGTYPE:
                contents[inode.layer, inode.index] = (path, inode)
            else:
                output.write(_header(path, inode))
        for layer, blob in enumerate(self._blobs):
            self._write_files(layer, blob, contents, output)
        for path, target, inode in links:
            output.write(_header(path, inode, link=target))
        output.write(bytes(2 * tarfile.BLOCKSIZE))

    def _write_files(
        self,
        layer: int,
        blob: Blob,
        contents: dict[tuple[int, int], tuple[str, _Inode]],
        output: IO[bytes],
    ) -> None:
        wanted = sum(1 for number, _ in contents if number == layer)
        if not wanted:
            return
        with reading(blob) as archive:
            for index, info in entries(archive):
                winner = contents.get((layer, index))
                if winner is not None:
                    output.write(_header(*winner))
                    _copy(archive, info, winner[1].size, output)
                    wanted -= 1
                    if not wanted:
                        break
        if wanted:
            raise refused("a layer changed while it was read")

    def _walk(self) -> Iterator[tuple[str, _Inode]]:
        stack: list[tuple[str, _Node]] = [("", self._root)]
        while stack:
            path, node = stack.pop()
            yield path, node.inode
            for name in sorted(node.children, reverse=True):
                stack.append((f"{path}/{name}" if path else name, node.children[name]))

    @property
    def root_mode(self) -> int:
        """Permission bits of the root directory (a tar stream to sqfstar cannot carry them)."""
        return self._root.inode.mode


def _hide_lower_children(node: _Node, layer: int) -> None:
    """Remove what lower layers put below ``node``; the current layer's entries stay."""
    pending, order = [node], []
    while pending:
        current = pending.pop()
        order.append(current)
        pending.extend(current.children.values())
    for current in reversed(order):
        current.children = {
            name: child
            for name, child in current.children.items()
            if child.layer >= layer or child.children
        }


def _inode(info: tarfile.TarInfo, layer: int, index: int) -> _Inode:
    if info.isdir():
        kind = tarfile.DIRTYPE
    elif info.isreg():
        kind = tarfile.REGTYPE
    elif info.issym() or info.type in _SPECIAL:
        kind = info.type
    else:
        raise refused(
            f"entry {info.name[:80]!r} is of an unknown type {info.type!r}", entry=info.name[:256]
        )
    if info.issym() and (not info.linkname or "\0" in info.linkname or len(info.linkname) > 4095):
        raise refused(f"symbolic link {info.name[:80]!r} has a bad target", entry=info.name[:256])
    if not (0 <= info.uid < 2**32 and 0 <= info.gid < 2**32):
        raise refused(f"entry {info.name[:80]!r} has a bad owner", entry=info.name[:256])
    xattrs = {
        key.removeprefix(_XATTR): value
        for key, value in info.pax_headers.items()
        if key.startswith(_XATTR) and key.removeprefix(_XATTR).startswith(_KEPT_XATTRS)
    }
    return _Inode(
        kind,
        layer,
        index,
        mode=info.mode & 0o7777,
        uid=info.uid,
        gid=info.gid,
        mtime=min(max(int(info.mtime), 0), 2**32 - 1),  # squashfs: unsigned 32 bit
        size=info.size if info.isreg() else 0,
        target=info.linkname if info.issym() else "",
        device=(info.devmajor, info.devminor) if info.type in _SPECIAL else (0, 0),
        xattrs=xattrs or None,
    )


def _header(path: str, inode: _Inode, *, link: str | None = None) -> bytes:
    info = tarfile.TarInfo(path or ".")
    info.type = inode.kind if link is None else tarfile.LNKTYPE
    info.mode, info.uid, info.gid, info.mtime = inode.mode, inode.uid, inode.gid, inode.mtime
    info.size = inode.size if link is None else 0
    info.linkname = inode.target if link is None else link
    info.devmajor, info.devminor = inode.device
    head = b""
    if inode.xattrs and link is None:
        records = [_record("path", info.name)]
        if info.linkname:
            records.append(_record("linkpath", info.linkname))
        records += [_record(_XATTR + key, value) for key, value in sorted(inode.xattrs.items())]
        head = _extended(b"".join(records))
        info.name = info.name.encode("utf-8", "surrogateescape")[:99].decode("ascii", "replace")
        info.name = info.name.replace("\ufffd", "_")
        info.linkname = "x" if len(info.linkname) > 99 else info.linkname
    return head + info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _record(key: str, value: str) -> bytes:
    """One PAX record: its own decimal length, the key and the value (pax(1))."""
    body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(body)
    while len(body) + len(str(length)) != length:
        length = len(body) + len(str(length))
    return str(length).encode() + body


def _extended(records: bytes) -> bytes:
    info = tarfile.TarInfo("./PaxHeaders/entry")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    padding = bytes(-len(records) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + records + padding


def _copy(archive: tarfile.TarFile, info: tarfile.TarInfo, size: int, output: IO[bytes]) -> None:
    source = archive.extractfile(info)
    if source is None or info.size != size:
        raise refused("a layer changed while it was read", entry=info.name[:256])
    left = size
    while left:
        data = source.read(min(left, _CHUNK))
        if not data:
            raise refused(f"entry {info.name[:80]!r} is cut off", entry=info.name[:256])
        output.write(data)
        left -= len(data)
    output.write(bytes(-size % tarfile.BLOCKSIZE))
