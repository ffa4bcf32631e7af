"""``stillframe snapshot``: create, list, get, edit, rm, restore, fork, warm.

Names work wherever ids do.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from stillframe.cli import output
from stillframe.cli.client import Client, instance_path, parse_pairs
from stillframe.cli.commands import family
from stillframe.cli.commands.instances import Compression, Hypervisor, compression_body
from stillframe.cli.commands.previews import DRY, DryRun, print_deletions, print_runs
from stillframe.cli.output import JsonFlag
from stillframe.model.errors import HostFailure, StillframeError
from stillframe.model.units import format_size, parse_duration
from stillframe.model.values import SnapshotKind

app = typer.Typer(help="Snapshots: write-once captures of instances.", no_args_is_help=True)
Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id, name or unique prefix.")]
_COLUMNS = ("NAME", "ID", "STATE")
_MOST = 1000
# Between two looks at forks that are being made ready, which takes a second or so for each.
_LOOK_SECONDS = 0.25
Tags = Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="KEY=VALUE")]
TargetState = Annotated[str | None, typer.Option("--state", help="Stopped, Standby or Running.")]


@app.command()
def create(
    context: typer.Context,
    instance: Annotated[str, typer.Argument(help="Name, id or unique id prefix.")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="Unique per instance.")] = None,
    kind: Annotated[
        SnapshotKind | None, typer.Option("--kind", help="Default: by the instance's state.")
    ] = None,
    compress: Compression = None,
    tag: Tags = None,
    as_json: JsonFlag = False,
) -> None:
    """Capture an instance; a running one runs on."""
    client: Client = context.obj
    if kind is None:
        state = client.request("GET", instance_path(instance))["state"]
        kind = SnapshotKind.STOPPED if state == "Stopped" else SnapshotKind.STANDBY
    body: dict[str, Any] = {"kind": kind.value}
    if name:
        body["name"] = name
    if tags := parse_pairs(tag, "--tag"):
        body["tags"] = tags
    if compress:
        body["compression"] = compression_body(compress)
    with output.working(f"capturing {instance}"):
        made = client.request("POST", instance_path(instance, "snapshots"), body=body)
    output.print_json(made) if as_json else _table([made])


@app.command("list")
def list_(
    context: typer.Context,
    instance: Annotated[str | None, typer.Option("--instance", help="Only of this source.")] = None,
    kind: Annotated[SnapshotKind | None, typer.Option("--kind")] = None,
    tag: Tags = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only ids.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List snapshots."""
    client: Client = context.obj
    query = {f"tags[{k}]": v for k, v in parse_pairs(tag, "--tag").items()}
    if kind is not None:
        query["kind"] = kind.value
    found = client.request("GET", "/snapshots", query=query)
    if instance:
        # By name as well as by id: the source may be deleted, so the server cannot resolve it.
        found = [
            s for s in found if instance in (s["source_instance_id"], s["source_instance_name"])
        ]
    if as_json:
        output.print_json(found)
    elif quiet:
        print(*(s["id"] for s in found), sep="\n", end="\n" if found else "")
    else:
        _table(found)


@app.command()
def get(context: typer.Context, snapshot: Snapshot, as_json: JsonFlag = False) -> None:
    """Show everything about a snapshot."""
    found = context.obj.find_snapshot(snapshot)
    output.print_json(found) if as_json else output.print_facts(found)


@app.command()
def edit(
    context: typer.Context,
    snapshot: Snapshot,
    name: Annotated[str | None, typer.Option("--name", "-n", help="'' takes it away.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="KEY=VALUE")] = None,
    untag: Annotated[list[str] | None, typer.Option("--untag", metavar="KEY")] = None,
    description: Annotated[str | None, typer.Option("--description", "-d")] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="RFC3339 time, from now (72h), or never.")
    ] = None,
    pin: Annotated[bool | None, typer.Option("--pin/--unpin", help="Keep it from expiry.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Change what is written beside a snapshot; what it holds never changes."""
    client: Client = context.obj
    found = client.find_snapshot(snapshot)
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = name or None
    if tag or untag:
        kept = {k: v for k, v in found.get("tags", {}).items() if k not in (untag or ())}
        changes["tags"] = {**kept, **parse_pairs(tag, "--tag")}
    if description is not None:
        changes["description"] = description or None
    if expires is not None:
        changes["expires_at"] = moment(expires)
    if pin is not None:
        changes["pinned"] = pin
    if not changes:
        raise typer.BadParameter("say what to change")
    edited = client.request("PATCH", f"/snapshots/{found['id']}", body=changes)
    output.print_json(edited) if as_json else output.print_facts(edited)


def moment(text: str, now: datetime | None = None) -> str | None:
    """``never`` (None), an RFC3339 time as it is, or a duration from ``now`` on as a time.

    Raises InvalidRequest.
    """
    if text == "never":
        return None
    if "T" in text:
        return text
    return ((now or datetime.now(UTC)) + parse_duration(text)).isoformat()


@app.command()
def rm(
    context: typer.Context,
    snapshots: list[str],
    force: Annotated[bool, typer.Option("--force", "-f", help="Pinned ones too.")] = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Delete snapshots; their sources and forks go on unharmed."""
    client: Client = context.obj
    query = {"force": "true"} if force else {}
    query |= DRY if dry_run else {}
    previews = []

    def delete(reference: str) -> None:
        found = client.find_snapshot(reference)
        preview = client.request("DELETE", f"/snapshots/{found['id']}", query=query)
        if preview is None:
            print(found["id"])
        else:
            previews.append(preview)

    try:
        output.each(snapshots, "deleting", delete)
    finally:
        if dry_run:
            print_deletions(previews, as_json)


@app.command()
def tree(
    context: typer.Context,
    snapshot: Annotated[str | None, typer.Argument(metavar="SNAPSHOT", show_default=False)] = None,
    instance: Annotated[
        str | None, typer.Option("--instance", help="Only what is related to it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show who descends from whom, and what deleting each would free."""
    client: Client = context.obj
    if snapshot is not None:
        found = client.find_snapshot(snapshot)
        answer = client.request("GET", f"/snapshots/{found['id']}/lineage")
        relatives = [answer["snapshot"], *answer["ancestors"], *answer["descendants"]]
    else:
        query = {"instance": instance} if instance else {}
        answer = relatives = client.request("GET", "/lineage", query=query)
    output.print_json(answer) if as_json else family.show(
        relatives, mark=found["id"] if snapshot is not None else None
    )


@app.command()
def restore(
    context: typer.Context,
    snapshot: Snapshot,
    instance: Annotated[
        str | None, typer.Option("--instance", help="Default: the snapshot's source.")
    ] = None,
    state: TargetState = None,
    hypervisor: Hypervisor = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Put a stopped or standby instance back to a snapshot."""
    client: Client = context.obj
    found = client.find_snapshot(snapshot)
    path = instance_path(
        instance or found["source_instance_id"], "snapshots", found["id"], "restore"
    )
    body = {"target_state": state} if state else {}
    body |= {"target_hypervisor": hypervisor} if hypervisor else {}
    if dry_run:
        preview = client.request("POST", path, body=body, query=DRY)
        print_runs([preview], as_json)
        return
    with output.working(f"restoring {found['source_instance_name']}"):
        answer = client.request("POST", path, body=body)
    output.print_json(answer) if as_json else _instance_table([answer])


@app.command()
def fork(
    context: typer.Context,
    snapshot: Snapshot,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="One fork for each name.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, max=_MOST, help="So many, numbered from 1.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="Of numbered names; default: the source's name.")
    ] = None,
    tag: Tags = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE")] = None,
    state: TargetState = None,
    hypervisor: Hypervisor = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Make new instances from a snapshot; exit 1 if not all could be made."""
    if bool(names) == (count is not None):
        raise typer.BadParameter("name the forks, or give --count")
    if names and prefix is not None:
        raise typer.BadParameter("--prefix goes with --count")
    client: Client = context.obj
    wishes: dict[str, Any] = {
        "target_state": state,
        "target_hypervisor": hypervisor,
        "tags": parse_pairs(tag, "--tag") or None,
        "env": parse_pairs(env, "--env") or None,
    }
    found = client.find_snapshot(snapshot)
    if count is not None:
        prefix = prefix or found["source_instance_name"]
        names = [f"{prefix}-{number}" for number in range(1, count + 1)]
        wishes |= {"count": count, "name_prefix": prefix}
    elif names and len(names) > 1:
        wishes |= {"count": len(names), "overrides": [{"name": name} for name in names]}
    body = {key: value for key, value in wishes.items() if value is not None}
    if dry_run:
        _preview_forks(client, found["id"], names or [], body, as_json)
        return
    with output.working(f"forking {snapshot}"):
        outcomes = _fork(client, f"/snapshots/{found['id']}", names or [], body)
    output.print_json(outcomes) if as_json else _outcome_table(outcomes)
    if failed := [outcome for outcome in outcomes if "error" in outcome]:
        for outcome in failed:
            output.say(f"error: {outcome['name']}: {_reason(outcome['error'])}")
        raise typer.Exit(1)


def _preview_forks(
    client: Client, snapshot_id: str, names: list[str], body: dict[str, Any], as_json: bool
) -> None:
    """What each of the forks would do; exit 1 if any would be refused."""
    path = f"/snapshots/{snapshot_id}"
    if "count" in body:
        previews = client.request("POST", f"{path}/forks", body=body, query=DRY)
    else:
        body = {**body, "name": names[0]}
        previews = [client.request("POST", f"{path}/fork", body=body, query=DRY)]
    print_runs(previews, as_json)


def _fork(
    client: Client, path: str, names: list[str], body: dict[str, Any]
) -> list[dict[str, Any]]:
    """One outcome (``instance`` or ``error``) for each name; a body with a count is for many."""
    if "count" not in body:
        made = client.request("POST", f"{path}/fork", body={**body, "name": names[0]})
        return [{"name": names[0], "instance": made}]
    try:
        answer = client.request("POST", f"{path}/forks", body=body)
    except StillframeError as error:
        outcomes = _none_made(error, names)
        if not outcomes:
            raise
        return outcomes
    made_or_not: list[dict[str, Any]] = answer["outcomes"]
    return made_or_not


def _none_made(error: StillframeError, names: list[str]) -> list[dict[str, Any]]:
    """The outcomes in the refusal of many forks; none if the request itself was refused."""
    details = error.facts.get("details")
    found = [
        (detail.get("code"), *str(detail.get("message")).partition(": ")[::2])
        for detail in (details if isinstance(details, list) else ())
    ]
    if [name for _, name, _ in found] != names:
        return []
    return [
        {"name": name, "error": {"code": code, "message": reason}} for code, name, reason in found
    ]


def _reason(error: dict[str, Any]) -> str:
    """An error body as one line, with its hint if it has one."""
    hints = [d["message"] for d in error.get("details") or () if d.get("code") == "hint"]
    return f"{error['message']} (hint: {hints[0]})" if hints else str(error["message"])


@app.command()
def warm(
    context: typer.Context,
    snapshot: Snapshot,
    count: Annotated[
        int | None,
        typer.Argument(metavar="N", min=0, max=_MOST, help="So many; 0: none. Default: show."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until they are ready; exit 1 if they cannot be.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Keep forks of a snapshot loaded and waiting, so that a fork only has to go."""
    client: Client = context.obj
    path = f"/snapshots/{client.find_snapshot(snapshot)['id']}/warm"
    if count is None:
        status = client.request("GET", path)
    else:
        status = client.request("PUT", path, body={"count": count})
    with output.working(f"preparing {status['target']} forks"):
        while wait and not _settled(status):
            threading.Event().wait(_LOOK_SECONDS)
            status = client.request("GET", path)
    if as_json:
        output.print_json(status)
    else:
        output.print_table(
            ("TARGET", "READY", "FILLING", "MEMORY", "LIMITED BY"),
            [(status["target"], status["ready"], status["filling"],
              format_size(status["memory_bytes"]), status.get("limited_by"))],
        )  # fmt: skip
    if wait and status["ready"] < status["target"]:
        raise HostFailure(
            f"{status['ready']} of {status['target']} forks are ready: {status['limited_by']}"
        )


def _settled(status: dict[str, Any]) -> bool:
    """Whether the number of warm forks will not change by itself."""
    limited = bool(status.get("limited_by")) and not status["filling"]
    return limited or bool(status["ready"] == status["target"])


def _outcome_table(outcomes: list[dict[str, Any]]) -> None:
    made = [outcome.get("instance") or {"state": "failed"} for outcome in outcomes]
    output.print_table(
        _COLUMNS,
        [(o["name"], i.get("id"), i["state"]) for o, i in zip(outcomes, made, strict=True)],
    )


def _table(snapshots: list[dict[str, Any]]) -> None:
    output.print_table(
        ("NAME", "ID", "KIND", "SOURCE", "SIZE", "STORED", "PAUSE", "AGE", "KEPT"),
        [
            (
                s.get("name"), s["id"], s["kind"], s["source_instance_name"],
                format_size(s["size_bytes"]),
                format_size(s["stored_bytes"]) if s.get("stored_bytes") else None,
                f"{s['pause_ms']:.0f} ms" if s.get("pause_ms") is not None else None,
                output.age(s["created_at"]),
                "damaged" if s.get("damaged")
                else "pinned" if s.get("pinned") else s.get("expires_at"),
            )
            for s in snapshots
        ],
    )  # fmt: skip


def _instance_table(instances: list[dict[str, Any]]) -> None:
    output.print_table(_COLUMNS, [(i["name"], i["id"], i["state"]) for i in instances])
