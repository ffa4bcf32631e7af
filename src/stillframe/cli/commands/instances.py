"""Commands on instances: run, ps, inspect, logs, stop, start, rm, standby, restore, fork, wait."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from stillframe.cli import output
from stillframe.cli.client import Client, guest_command, instance_path, parse_pairs
from stillframe.cli.commands.previews import DRY, DryRun, print_deletions, print_runs
from stillframe.cli.output import JsonFlag
from stillframe.model.errors import HostFailure, InvalidRequest, Timeout
from stillframe.model.states import InstanceState

Reference = Annotated[str, typer.Argument(metavar="INSTANCE", help="Name, id or unique id prefix.")]
Hypervisor = Annotated[
    str | None,
    typer.Option("--hypervisor", help="Another one, for snapshots of stopped instances."),
]
Expiry = Annotated[
    str | None,
    typer.Option("--expires", help="Delete it by itself: RFC3339 time, from now (72h), or never."),
]
CompressDelay = Annotated[
    str | None,
    typer.Option("--compress-delay", metavar="DURATION", help="In standby, before compressing."),
]
Compression = Annotated[
    str | None,
    typer.Option("--compress", metavar="zstd|lz4|none[:LEVEL]", help="Compress the memory."),
]

_COLUMNS = ("NAME", "ID", "STATE")


def run(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="Image to boot; stillframe/base is built in.")],
    command: Annotated[
        list[str] | None, typer.Argument(help="Replaces the image's command.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="Unique name.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", "-m", help="For example 512MB.")] = None,
    vcpus: Annotated[int | None, typer.Option("--vcpus", "-c", min=1)] = None,
    overlay: Annotated[str | None, typer.Option("--overlay", help="Writable disk size.")] = None,
    hypervisor: Annotated[str | None, typer.Option("--hypervisor")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="KEY=VALUE")] = None,
    entrypoint: Annotated[str | None, typer.Option("--entrypoint")] = None,
    network: Annotated[bool, typer.Option("--network/--no-network")] = True,
    compress: Compression = None,
    compress_delay: CompressDelay = None,
    expires: Expiry = None,
    disk_io: Annotated[
        str | None, typer.Option("--disk-io", help="Limit of each disk, for example 100MB/s.")
    ] = None,
    bandwidth_down: Annotated[
        str | None, typer.Option("--bandwidth-down", help="For example 1Gbps or 125MB/s.")
    ] = None,
    bandwidth_up: Annotated[str | None, typer.Option("--bandwidth-up")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it runs.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Create an instance from an image and boot it."""
    client: Client = context.obj
    wishes: dict[str, Any] = {
        "name": name or _made_up_name(),
        "image": image,
        "size": memory,
        "vcpus": vcpus,
        "overlay_size": overlay,
        "hypervisor": hypervisor,
        "env": parse_pairs(env, "--env") or None,
        "tags": parse_pairs(tag, "--tag") or None,
        "entrypoint": [entrypoint] if entrypoint else None,
        "cmd": guest_command(command) or None,
        "network": _given(
            enabled=None if network else False,
            bandwidth_download=bandwidth_down,
            bandwidth_upload=bandwidth_up,
        )
        or None,
        "disk_io_bps": disk_io,
        "snapshot_policy": _policy(compress, compress_delay),
        **(expiry_body(expires) if expires else {}),
    }
    body = _given(**wishes)
    with output.working(f"booting {body['name']}"):
        instance = client.request("POST", "/instances", body=body)
        if wait:
            _wait_for(client, instance["id"], "Running", "2m")
            instance = client.request("GET", instance_path(instance["id"]))
    _show(instance, as_json)


def _given(**wishes: Any) -> dict[str, Any]:
    return {key: value for key, value in wishes.items() if value is not None}


def ps(
    context: typer.Context,
    state: Annotated[InstanceState | None, typer.Option("--state", "-s")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="KEY=VALUE")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only ids.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List instances."""
    client: Client = context.obj
    query = {f"tags[{k}]": v for k, v in parse_pairs(tag, "--tag").items()}
    if state is not None:
        query["state"] = state.value
    instances = client.request("GET", "/instances", query=query)
    if as_json:
        output.print_json(instances)
    elif quiet:
        print(*(i["id"] for i in instances), sep="\n", end="\n" if instances else "")
    else:
        output.print_table(
            ("NAME", "ID", "STATE", "IMAGE", "CPUS", "MEMORY", "HYPERVISOR", "AGE"),
            [
                (i["name"], i["id"], i["state"], i["image"], i.get("vcpus"), i.get("size"),
                 i.get("hypervisor"), output.age(i["created_at"]))
                for i in instances
            ],
        )  # fmt: skip


def inspect(context: typer.Context, instance: Reference, as_json: JsonFlag = False) -> None:
    """Show everything about an instance."""
    found = context.obj.request("GET", instance_path(instance))
    output.print_json(found) if as_json else output.print_facts(found)


def logs(
    context: typer.Context,
    instance: Reference,
    follow: Annotated[bool, typer.Option("--follow", "-f")] = False,
    tail: Annotated[int, typer.Option("--tail", min=0)] = 100,
    source: Annotated[str, typer.Option("--source", help="app, vmm or hypeman.")] = "app",
    as_json: JsonFlag = False,
) -> None:
    """Print an instance's log."""
    query = {"tail": str(tail), "follow": str(follow).lower(), "source": source}
    for line in context.obj.events(instance_path(instance, "logs"), query):
        print(output.json_line({"line": line}) if as_json else line, flush=follow)


def stop(context: typer.Context, instances: list[str], as_json: JsonFlag = False) -> None:
    """Shut instances down; their disks stay."""
    _each(context, instances, "stop", "stopping", as_json)


def start(
    context: typer.Context,
    instances: list[str],
    entrypoint: Annotated[
        str | None, typer.Option("--entrypoint", help="From now on, in place of the image's.")
    ] = None,
    command: Annotated[
        str | None, typer.Option("--cmd", help="From now on, as one text: 'sleep 60'.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Boot stopped instances again."""
    wishes: dict[str, Any] = {}
    if entrypoint is not None:
        wishes["entrypoint"] = _words(entrypoint, "--entrypoint")
    if command is not None:
        wishes["cmd"] = _words(command, "--cmd")
    _each(context, instances, "start", "starting", as_json, wishes)


def restore(context: typer.Context, instances: list[str], as_json: JsonFlag = False) -> None:
    """Bring instances in standby back to running."""
    _each(context, instances, "restore", "restoring", as_json)


def standby(
    context: typer.Context,
    instances: list[str],
    compress: Compression = None,
    compress_delay: CompressDelay = None,
    as_json: JsonFlag = False,
) -> None:
    """Keep instances' memory on disk and free the host's."""
    body: dict[str, Any] = {"compression": compression_body(compress)} if compress else {}
    if compress_delay:
        body["compression_delay"] = compress_delay
    _each(context, instances, "standby", "saving", as_json, body)


def edit(
    context: typer.Context,
    instance: Reference,
    expires: Expiry = None,
    as_json: JsonFlag = False,
) -> None:
    """Change when an instance is deleted by itself."""
    if not expires:
        raise typer.BadParameter("say what to change")
    edited = context.obj.request("PATCH", instance_path(instance), body=expiry_body(expires))
    output.print_json(edited) if as_json else output.print_facts(edited)


def stats(context: typer.Context, instance: Reference, as_json: JsonFlag = False) -> None:
    """Show what the hypervisor of an instance takes of this host."""
    found = context.obj.request("GET", instance_path(instance, "stats"))
    output.print_json(found) if as_json else output.print_facts(found)


def rm(
    context: typer.Context,
    instances: Annotated[list[str] | None, typer.Argument(help="Names, ids or prefixes.")] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Do not let the guest shut down first.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every instance.")] = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete instances; their snapshots stay."""
    client: Client = context.obj
    if bool(instances) == everything:
        raise typer.BadParameter("name instances, or give --all")
    if everything:
        instances = [i["id"] for i in client.request("GET", "/instances")]
    if dry_run:
        answers = [
            client.request("DELETE", instance_path(instance), query=DRY)
            for instance in instances or []
        ]
        print_deletions(answers, as_json)
        return
    query = {"graceful_shutdown": str(not force).lower()}

    def delete(instance: str) -> None:
        client.request("DELETE", instance_path(instance), query=query)
        print(instance)

    output.each(instances or [], "deleting", delete)


def fork(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="INSTANCE", help="Running, Standby or Stopped.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="One fork for each name.")],
    state: Annotated[str | None, typer.Option("--state", help="Stopped, Standby, Running.")] = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Fork an instance as it is now; a running one runs on."""
    client: Client = context.obj
    body: dict[str, Any] = {"from_running": True}
    if state:
        body["target_state"] = state
    if dry_run:
        path = instance_path(source, "fork")
        wishes = [{**body, "name": name} for name in names]
        previews = [client.request("POST", path, body=wish, query=DRY) for wish in wishes]
        print_runs(previews, as_json)
        return
    with output.answers(_COLUMNS, as_json) as made:
        for name in names:
            with output.working(f"forking {name}"):
                made.append(
                    client.request(
                        "POST", instance_path(source, "fork"), body={**body, "name": name}
                    )
                )


def wait(
    context: typer.Context,
    instance: Reference,
    state: Annotated[InstanceState, typer.Option("--state", "-s")] = InstanceState.RUNNING,
    timeout: Annotated[str, typer.Option("--timeout", help="At most 5m.")] = "60s",
    as_json: JsonFlag = False,
) -> None:
    """Wait until an instance is in a state; exit 1 if it does not get there."""
    with output.working(f"waiting for {instance}"):
        result = _wait_for(context.obj, instance, state.value, timeout)
    output.print_json(result) if as_json else print(result["state"])


def compression_body(text: str) -> dict[str, Any]:
    """``zstd``, ``lz4:3`` or ``none`` as a CompressionConfig. Raises InvalidRequest."""
    algorithm, _, level = text.partition(":")
    if algorithm == "none":
        return {"enabled": False}
    if algorithm not in ("zstd", "lz4") or (level and not level.isdecimal()):
        raise InvalidRequest(f"invalid compression {text!r}", hint="write zstd, lz4:3 or none")
    body: dict[str, Any] = {"enabled": True, "algorithm": algorithm}
    return {**body, "level": int(level)} if level else body


def expiry_body(text: str) -> dict[str, str]:
    """``never``, a duration or a time as the contract's ``ttl`` or ``expires_at``."""
    if text == "never":
        return {"ttl": "0s"}
    return {"expires_at": text} if "T" in text else {"ttl": text}


def _policy(compress: str | None, delay: str | None) -> dict[str, Any] | None:
    policy: dict[str, Any] = {"compression": compression_body(compress)} if compress else {}
    if delay:
        policy["standby_compression_delay"] = delay
    return policy or None


def _words(text: str, option: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidRequest(f"{option} {text!r} cannot be split into words: {error}") from error


def _each(
    context: typer.Context,
    instances: list[str],
    verb: str,
    doing: str,
    as_json: bool,
    body: dict[str, Any] | None = None,
) -> None:
    with output.answers(_COLUMNS, as_json) as done:

        def ask(instance: str) -> None:
            done.append(context.obj.request("POST", instance_path(instance, verb), body=body or {}))

        output.each(instances, doing, ask)


def _wait_for(client: Client, instance: str, state: str, timeout: str) -> dict[str, Any]:
    query = {"state": state, "timeout": timeout}
    result: dict[str, Any] = client.request("GET", instance_path(instance, "wait"), query=query)
    if result["timed_out"]:
        raise Timeout(
            f"{instance} is {result['state']} after {timeout}, not {state}",
            hint=f"`stillframe logs {instance}` shows its console",
        )
    if result["state"] != state:
        why = f": {result['state_error']}" if result.get("state_error") else ""
        raise HostFailure(
            f"{instance} is {result['state']} and will not become {state}{why}",
            hint=f"`stillframe logs {instance}` shows its console",
        )
    return result


def _show(instance: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(instance)
    else:
        output.print_table(_COLUMNS, [(instance["name"], instance["id"], instance["state"])])


def _made_up_name() -> str:
    import secrets

    return f"vm-{secrets.token_hex(3)}"
