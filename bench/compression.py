"""What compressing and verifying a memory image costs, beside the zstd and lz4 programs.

    make bench-compression     (or: python bench/compression.py --image FILE --runs 5)

Without ``--image`` it makes one as a guest's memory is: file pages, a process's heap, random
pages, pages of zeros and holes. Ours and the program's runs alternate, so that the host's mood hits
both alike; both end with the output on the device. Speeds are bytes of data (not holes) in the
image per second. Prints tables and writes bench/results-compression.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stillframe.host.files import allocated_bytes, create_sparse, fsync_file
from stillframe.host.process import run_blocking
from stillframe.model.units import KIB, MIB
from stillframe.model.values import CompressionAlgorithm, CompressionConfig
from stillframe.store.archive_export import export
from stillframe.store.archive_import import Importer, Limits
from stillframe.store.compression import compress, expand
from stillframe.store.digests import write_table
from stillframe.store.paths import Payload
from stillframe.store.payloads import seal, switch_to_compressed
from stillframe.store.readers import FileReader
from stillframe.store.verification import Depth, verify

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = 1.10  # ours may take so much longer than the program
SETTINGS = [
    (CompressionAlgorithm.ZSTD, 1, ["zstd", "-1", "-T0"]),
    (CompressionAlgorithm.ZSTD, 3, ["zstd", "-3", "-T0"]),
    (CompressionAlgorithm.LZ4, 0, ["lz4", "-1"]),
]


def pages(size: int, seed: int) -> Iterator[bytes | None]:
    """Runs of pages as they lie in a guest's memory; None is a hole of 64 KiB."""
    chance = random.Random(seed)
    files = [
        path
        for directory in ("/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/share/doc")
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file() and not path.is_symlink()
    ]
    heap = own_heap()
    left = size
    while left > 0:
        kind, run = chance.random(), 64 * KIB * chance.randint(1, 32)
        if kind < 0.40:
            for _ in range(run // (64 * KIB)):
                yield None
        elif kind < 0.70:
            data = chance.choice(files).read_bytes()[: 4 * run]
            data += bytes(-len(data) % (64 * KIB))
            run = len(data)
            yield data
        elif kind < 0.90:
            start = chance.randrange(0, max(1, len(heap) - run), 4 * KIB)
            data = heap[start : start + run]
            yield data + bytes(run - len(data))
        elif kind < 0.94:
            yield chance.randbytes(run)
        else:
            yield b"".join(chance.choice((bytes(4096), chance.randbytes(64) * 64))
                           for _ in range(run // 4096))  # fmt: skip
        left -= run


def own_heap() -> bytes:
    """The private writable memory of this process: a heap as a guest's process has one."""
    found = []
    maps = Path("/proc/self/maps").read_text()
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        for start, end in re.findall(r"^(\w+)-(\w+) rw-p \S+ \S+ 0 ", maps, re.MULTILINE):
            memory.seek(int(start, 16))
            found.append(memory.read(min(int(end, 16) - int(start, 16), 32 * MIB)))
    return b"".join(found)


def make_image(path: Path, size: int) -> None:
    """A sparse image of ``size`` bytes."""
    create_sparse(path, size)
    with path.open("r+b") as file:
        position = 0
        for data in pages(size, seed=1):
            if data is not None:
                file.seek(position)
                file.write(data[: size - position])
            position += 64 * KIB if data is None else len(data)
            if position >= size:
                break
    fsync_file(path)


def timed(work: Callable[[], object], output: Path | None = None) -> float:
    """Seconds until ``work`` is done and its output on the device."""
    if output is not None:
        output.unlink(missing_ok=True)
    began = time.perf_counter()
    work()
    if output is not None:
        fsync_file(output)
    return time.perf_counter() - began


def compare(
    image: Path, algorithm: CompressionAlgorithm, level: int, program: list[str], runs: int
) -> dict[str, object]:
    """Ours beside the program: seconds and sizes."""
    ours, theirs, back = (image.with_name(n) for n in ("ours", "theirs", "back"))
    config = CompressionConfig(True, algorithm, level)
    took: dict[str, list[float]] = {k: [] for k in ("pack", "pack_by", "unpack", "unpack_by")}
    name, size = program[0], image.stat().st_size
    pack: list[str | Path] = [
        *program,
        "-q",
        "-f",
        image,
        *(["-o"] if name == "zstd" else []),
        theirs,
    ]
    unpack: list[str | Path] = [
        name,
        "-d",
        "-q",
        "-f",
        theirs,
        *(["-o"] if name == "zstd" else []),
        back,
    ]
    for _ in range(runs):
        took["pack"].append(timed(lambda: compress(image, ours, config), ours))
        took["pack_by"].append(timed(lambda: run_blocking(pack, timeout=3600), theirs))
        took["unpack"].append(timed(lambda: expand(ours, back, size=size), back))
        took["unpack_by"].append(timed(lambda: run_blocking(unpack, timeout=3600), back))
    data = allocated_bytes(image)
    result: dict[str, object] = {"algorithm": algorithm.value, "level": level, "seconds": took}
    result |= {
        f"{key}_mb_s": data / statistics.median(values) / 1e6 for key, values in took.items()
    }
    result["ratio"] = data / ours.stat().st_size
    result["ratio_by"] = data / theirs.stat().st_size
    for path in (ours, theirs, back):
        path.unlink()
    return result


def measure_digests(payload: Payload, runs: int) -> dict[str, float]:
    """MB/s of digesting, verifying, exporting and importing, on one thread or on all."""
    found: dict[str, list[float]] = {}
    data = allocated_bytes(payload.memory)

    def note(key: str, work: Callable[[], object], output: Path | None = None) -> None:
        found.setdefault(key, []).append(data / timed(work, output) / 1e6)

    def check(threads: int | None) -> None:
        *_, last = verify(payload, Depth.FULL, threads=threads)
        assert not last.damage, last

    def digest(threads: int | None) -> None:
        with FileReader(payload.memory) as reader:
            write_table(reader, scratch, threads=threads)

    def take(stream: list[bytes], directory: Path) -> None:
        with Importer(directory, Limits(1 << 60, 1 << 60)) as importer:
            for data in stream:
                importer.feed(data)
            importer.finish()

    arrived = payload.directory.parent / "arrived"
    scratch, stream = payload.directory.parent / "scratch.blake3", list[bytes]()
    for _ in range(runs):
        note("digest table, one thread", lambda: digest(1), scratch)
        note("digest table, all threads", lambda: digest(None), scratch)
        note("verify, one thread", lambda: check(1))
        note("verify, all threads", lambda: check(None))
        note("export, all threads", lambda: stream.extend(export(payload)))
        note("import", lambda: take(stream, arrived))
        stream.clear()
        shutil.rmtree(arrived)
    final = payload.compressed(CompressionAlgorithm.ZSTD)
    compress(payload.memory, payload.being_built(final), CompressionConfig(True))
    switch_to_compressed(payload, CompressionAlgorithm.ZSTD)
    for _ in range(runs):
        note("verify zstd, all threads", lambda: check(None))
    return {key: statistics.median(values) for key, values in found.items()}


def report(rows: list[dict[str, object]], digests: dict[str, float], data: int) -> int:
    """Print and write the figures; 1 when the target is missed."""
    print(f"{os.cpu_count()} processors, {data / 1e6:.0f} MB of data in the image\n")
    print("| | compress MB/s | program | ratio | program | expand MB/s | program |")
    print("|---|---|---|---|---|---|---|")
    keys = ("pack_mb_s", "pack_by_mb_s", "ratio", "ratio_by", "unpack_mb_s", "unpack_by_mb_s")
    for row in rows:
        values = (f"{row[key]:.2f}" if "ratio" in key else f"{row[key]:.0f}" for key in keys)
        print(f"| {row['algorithm']} {row['level']} | {' | '.join(values)} |")
    print("\n| | MB/s |\n|---|---|")
    for name, speed in digests.items():
        print(f"| {name} | {speed:.0f} |")
    missed = [
        f"{row['algorithm']} {row['level']}"
        for row in rows
        if float(str(row["pack_by_mb_s"])) > ALLOWED * float(str(row["pack_mb_s"]))
    ]
    result = {"compression": rows, "digests_mb_s": digests, "data_bytes": data}
    path = ROOT / "bench" / "results-compression.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwithin 10 % of the programs: {'NOT ' + ', '.join(missed) if missed else 'reached'}")
    return 1 if missed else 0


def main(image: Path | None, size: int, runs: int, directory: Path | None) -> int:
    """Measure, print, write."""
    place = Path(tempfile.mkdtemp(prefix="stillframe-bench-", dir=directory))
    try:
        payload = Payload(place / "payload")
        payload.directory.mkdir()
        if image is None:
            make_image(payload.memory, size)
        else:
            run_blocking(["cp", "--sparse=always", image, payload.memory], timeout=3600)
        data = allocated_bytes(payload.memory)
        rows = [compare(payload.memory, *setting, runs) for setting in SETTINGS]
        seal(payload, {})
        return report(rows, measure_digests(payload, runs), data)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, help="a real memory image")
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work, for example /dev/shm")
    given = parser.parse_args()
    raise SystemExit(main(given.image, given.size_mib * MIB, given.runs, given.directory))
