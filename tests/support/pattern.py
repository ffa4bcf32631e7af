"""Guests that write a pattern to memory for ever, and can check it (tests/guest/pattern.c)."""

from __future__ import annotations

from pathlib import Path

from hypeman import Hypeman

from support.server import Server, run_in, wait_running

MIB_WRITTEN = 96


def writing_guest(server: Server, client: Hypeman, name: str, pattern: Path, vcpus: int = 1) -> str:
    """The id of a guest whose threads rewrite its memory for ever, once over at least."""
    instance = client.instances.create(
        name=name, image="stillframe/base", size="256MB", overlay_size="1GB", vcpus=vcpus
    )
    wait_running(client, instance.id)
    copied = server.cli("cp", str(pattern), f"{name}:/root/pattern")
    assert copied.returncode == 0, copied.stderr
    start = (
        f"chmod +x /root/pattern; setsid /root/pattern write /dev/shm/p {MIB_WRITTEN} {vcpus} "
        "</dev/null >/dev/null 2>&1 & until [ -s /dev/shm/p ]; do usleep 20000; done"
    )
    run_in(client, instance.id, "sh", "-c", start)
    while check(client, instance.id) < MIB_WRITTEN * 256:  # a first round over all of it
        pass
    return instance.id


def check(client: Hypeman, instance_id: str) -> int:
    """Have the guest check its memory; the pages it has written in its life."""
    word, pages = run_in(client, instance_id, "/root/pattern", "check", "/dev/shm/p").split()
    assert word == "good"
    return int(pages)
