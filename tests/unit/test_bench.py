"""The benchmark's own arithmetic: a wrong ratio would be believed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench import run
from bench.client import running_ms
from bench.echo import _ANSWER, _MAGIC, _QUESTION, Echo
from bench.guest_image import PROGRAMS, build_programs, root_tar
from bench.hand import plain_memory
from bench.peer import copy_directory
from bench.plots import draw
from bench.report import file_system_of, markdown, phase_table, table, write
from bench.results import Row, figure, median_phases, number, p90, ratio_row, slope
from bench.rows_forks import core_ms
from bench.rows_storage import private_mib
from stillframe.host.files import create_sparse

FACTS: dict[str, Any] = {
    "date": "2026-01-01T00:00:00+00:00", "commit": "abc", "runs": 20, "quick": False,
    "seconds": 600,
    "running_stops_at": "resumed_at", "qemu": "7.2.0", "accelerator": "tcg", "file_system": "xfs",
    "kernel": "6.1", "processor": "a processor", "cores": 2, "load_before": 0.1,
}  # fmt: skip


def test_p90_is_a_value_that_was_measured() -> None:
    assert p90([5.0]) == 5.0
    assert p90(list(range(1, 21))) == 18
    assert p90([3, 1, 2]) == 3


def test_slope_is_not_moved_by_an_outlier() -> None:
    points = [(x, 100.0 - 7 * x) for x in range(10)]
    points[4] = (4, 1000.0)
    assert slope(points) == -7


def test_phases_that_only_some_runs_had_are_kept_in_order() -> None:
    runs = [{"a": 1.0, "b": 10.0}, {"a": 3.0, "c": 5.0}, {"a": 2.0, "b": 20.0}]
    assert median_phases(runs) == {"a": 2.0, "b": 15.0, "c": 5.0}
    assert list(median_phases(runs)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (-0.97, "-0.970")],
)
def test_numbers_keep_the_digits_they_need(value: float, text: str) -> None:
    assert number(value) == text


def test_figures_name_median_and_percentile() -> None:
    assert figure([1.0, 2.0, 30.0]) == "2.00 ms (p90 30.0)"


def test_a_ratio_is_that_of_the_medians_and_keeps_both_sides() -> None:
    row = Row("k", "ours / theirs", "<= 1.2", limit=1.2)
    ratio_row(row, [10, 12, 90], [10, 10, 10], ("ours", "theirs"))
    assert row.value == 1.2
    assert row.verdict == "reached"
    assert row.samples == {"ours": [10, 12, 90], "theirs": [10, 10, 10]}
    assert row.details == ["ours 12.0 ms (p90 90.0)", "theirs 10.0 ms (p90 10.0)"]


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("k", "m", "t", limit=1.0, value=1.0), "reached"),
        (Row("k", "m", "t", limit=1.0, value=1.01), "NOT REACHED"),
        (Row("k", "m", "t", limit=1.0, value=0.5, conditions=[("c", 6, 5)]), "NOT REACHED"),
        (Row("k", "m", "t", limit=1.0, value=0.5, conditions=[("c", 5, 5)]), "reached"),
        (Row("k", "m", "t", value=5.0), "shown"),
        (Row("k", "m", "t", limit=1.0, not_run="no root"), "not run: no root"),
        (Row("k", "m", "t", limit=1.0), "not run: there is no figure"),
        (Row("k", "m", "t", value=0.1, limit=1.0, failed="boom"), "FAILED: boom"),
    ],
)
def test_verdicts(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_the_moment_of_cont_is_believed_only_inside_of_the_request() -> None:
    sent, answered = 1_000_000_000.0, 1_000_000_001.0
    inside = {"resumed_at": "2001-09-09T01:46:40.250000Z"}
    assert running_ms(inside, sent, answered) == 250
    assert running_ms({}, sent, answered) == 1000
    with pytest.raises(ValueError, match="outside"):
        running_ms({"resumed_at": "2001-09-09T01:46:41.500000Z"}, sent, answered)


def test_the_engine_core_is_every_phase_before_the_guest_runs() -> None:
    assert core_ms({"claim": 1.0, "resume": 2.0, "identify": 50.0, "total": 53.0}) == 3.0


def test_what_a_vmm_holds_is_told_apart_from_what_its_guest_wrote() -> None:
    smaps = (
        "55d0-55d1 rw-p 00000000 fe:00 12   /usr/bin/qemu-system-x86_64\n"
        "Size: 100 kB\nAnonymous: 1024 kB\nVmFlags: rd wr\n"
        "7f00-7f01 rw-p 00000000 fe:00 99   /data/instances/x/memory\n"
        "Rss: 9000 kB\nAnonymous: 2048 kB\n"
        "7f02-7f03 rw-p 00000000 00:00 0 \nAnonymous: 512 kB\n"
    )
    assert private_mib(smaps) == (2.0, 1.5)


def test_plain_memory_drops_the_image_and_nothing_else() -> None:
    command = [
        "qemu", "-M", "q35,memory-backend=mem,smm=off", "-m", "256M",
        "-object", "memory-backend-file,id=mem,mem-path=/x", "-device", "virtio-rng-pci",
    ]  # fmt: skip
    assert plain_memory(command) == [
        "qemu", "-M", "q35,smm=off", "-m", "256M", "-device", "virtio-rng-pci",
    ]  # fmt: skip


def test_the_peers_copy_is_equal_and_as_sparse(tmp_path: Path) -> None:
    source = tmp_path / "vm"
    (source / "logs").mkdir(parents=True)
    (source / "logs" / "app.log").write_text("hello\n")
    create_sparse(source / "disk", 8 << 20)
    with (source / "disk").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"data" * 4096)
    copy_directory(source, tmp_path / "copy")
    assert (tmp_path / "copy/disk").read_bytes() == (source / "disk").read_bytes()
    assert (tmp_path / "copy/disk").stat().st_blocks < 2048
    assert (tmp_path / "copy/logs/app.log").read_text() == "hello\n"


def test_the_image_holds_the_guests_programs(tmp_path: Path) -> None:
    programs = build_programs(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(root_tar(programs))) as archive:
        names = archive.getnames()
        assert {f"usr/bin/{name}" for name in PROGRAMS} <= set(names)
        assert "bin/sh" in names
        found = archive.extractfile("usr/bin/ticks")
        assert found is not None
        assert found.read() == programs["ticks"]


def test_the_writer_says_when_its_memory_is_not_what_it_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_programs(tmp_path)
    program = str(tmp_path / "dirty")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DIRTY_PORT", str(free.getsockname()[1]))
    subprocess.run([program, "2", "0"], check=True)
    pid = _pid_of(program)
    try:
        answer = subprocess.run([program, "ask", "rewrite=3"], capture_output=True, check=True)
        assert re.match(rb"good pages=512 written=768 ms=\d+\n", answer.stdout)
        subprocess.run([program, "ask", "verify"], capture_output=True, check=True)
        _spoil(pid)
        spoilt = subprocess.run([program, "ask", "verify"], capture_output=True, check=False)
        assert spoilt.returncode == 1
        assert spoilt.stdout.startswith(b"BAD")
    finally:
        os.kill(pid, 9)


def _pid_of(program: str) -> int:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            command = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
            if command.startswith(program.encode()):
                return int(entry.name)
    raise AssertionError(program)


def _spoil(pid: int) -> None:
    """Change a byte in the middle of the writer's memory: its largest anonymous mapping."""
    sizes = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if line.split()[1].startswith("rw") and len(line.split()) == 5:
            sizes[end - start] = start
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(sizes[max(sizes)] + (1 << 20))
        memory.write(b"\0")


def test_windows_of_a_guest_that_ticks() -> None:
    """A guest played by hand: it reports the window that ended, and is told that it is known."""
    echo = Echo()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest:
            guest.settimeout(10)
            guest.connect(("127.0.0.1", echo.port))
            token = echo.new_token()

            def ask(has_figures: int, window: int = 0, largest: int = 0) -> tuple[int, ...]:
                counts = (7, 1, *range(12)) if has_figures else (0,) * 14
                guest.send(_QUESTION.pack(_MAGIC, token, 5, has_figures, window, *counts, largest))
                return tuple(_ANSWER.unpack(guest.recv(64)))

            before = time.monotonic_ns()
            _, sequence, window, acknowledged, now = ask(0)
            assert (sequence, window, acknowledged) == (5, 0, 0)
            assert before < now < time.monotonic_ns()
            echo.await_guest(token)
            with echo.window(token) as figures:
                _, _, window, _, _ = ask(0)
                assert window == 1
                # Sent ahead of the end of the window: it must not be taken for another one's.
                assert ask(1, window, 2_500_000)[3] == window
        assert figures[0].largest_ms == 2.5
        assert (figures[0].count, figures[0].lost) == (7, 1)
        assert figures[0].histogram == tuple(range(12))
    finally:
        echo.close()


def test_report_names_every_row_and_the_phases_of_those_not_reached(tmp_path: Path) -> None:
    rows = [
        Row("a", "fast", "<= 2", limit=2, value=1, phases={"fork": {"load": 5.0, "total": 6.0}}),
        Row("b", "slow", "<= 2", limit=2, value=3, phases={"warm": {"claim": 1.0, "go": 9.0}}),
        Row("c", "absent", "<= 2", limit=2, not_run="the server answers 404"),
    ]
    text = write(rows, FACTS, tmp_path, ["plots/x.png"])
    assert text == (tmp_path / "results.md").read_text()
    assert "| fast | 1.00 | <= 2 | reached |" in text
    assert "| absent | - | <= 2 | not run: the server answers 404 |" in text
    assert "where it goes, warm: go 9.00, claim 1.00 ms" in text
    assert "where it goes, fork" not in text
    assert "![x](plots/x.png)" in text
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [row["verdict"] for row in stored["rows"]] == [row.verdict for row in rows]
    assert stored["circumstances"]["cores"] == 2


def test_phase_table_is_empty_without_phases() -> None:
    assert phase_table([Row("a", "m", "t")]) == ""
    assert table([]).count("\n") == 1
    assert markdown([], FACTS, []).startswith("# What Stillframe costs")


def test_plots_show_what_there_is(tmp_path: Path) -> None:
    busy = {
        f"{who} {gib} GiB: {what}": [5.0, 7.0]
        for who in ("ours", "peers") for gib in (1, 2, 4) for what in ("gap", "noise")
    }  # fmt: skip
    rows = [
        Row("cold-fork", "m", "t", samples={"cold": [2.0, 3.0], "floor": [1.0, 2.0]}),
        Row("busy-pause", "m", "t", samples=busy),
    ]
    drawn = draw(rows, tmp_path / "plots")
    assert drawn == ["plots/fork-times.png", "plots/pause-by-size.png"]
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_options_choose_rows_and_keep_full_results_from_partial_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "changed_files", list)
    full, quick = run.parse([]), run.parse(["--quick"])
    assert (full.runs, quick.runs) == (20, 3)
    assert full.out != quick.out == run.parse(["--only", "cold-fork"]).out
    assert set(full.only) == set(run.KEYS)
    with pytest.raises(SystemExit):
        run.parse(["--only", "nonsense"])
    monkeypatch.setattr(run, "changed_files", lambda: ["src/stillframe/x.py"])
    with pytest.raises(SystemExit):
        run.parse([])
    assert "x.py changed since" in capsys.readouterr().err
    assert run.parse(["--quick"]).out == quick.out  # to try out what is not committed yet


def test_file_system_of_proc() -> None:
    assert file_system_of(Path("/proc/self")) == "proc"
