"""``stillframe schedule``: get, set, pause, resume, run, explain, rm."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stillframe.cli import output
from stillframe.cli.client import Client, instance_path, parse_pairs
from stillframe.cli.commands.instances import Reference
from stillframe.cli.output import JsonFlag
from stillframe.model.units import format_size

app = typer.Typer(help="Schedules: snapshots taken by themselves.", no_args_is_help=True)


@app.command()
def get(context: typer.Context, instance: Reference, as_json: JsonFlag = False) -> None:
    """Show the schedule of an instance."""
    _show(context.obj.request("GET", _path(instance)), as_json)


@app.command("set")
def set_(
    context: typer.Context,
    instance: Reference,
    every: Annotated[str | None, typer.Option("--every", help="Interval: 1h30m.")] = None,
    cron: Annotated[str | None, typer.Option("--cron", help="'0 3 * * *', in UTC.")] = None,
    max_count: Annotated[int | None, typer.Option(min=0, help="Number to keep at most.")] = None,
    max_age: Annotated[str | None, typer.Option(help="Age to keep at most: 168h.")] = None,
    keep_last: Annotated[
        int | None, typer.Option(min=0, help="Number of newest ones to keep always.")
    ] = None,
    hourly: Annotated[
        int | None, typer.Option(min=0, help="Number of hours of which to keep the last.")
    ] = None,
    daily: Annotated[
        int | None, typer.Option(min=0, help="Number of days of which to keep the last.")
    ] = None,
    weekly: Annotated[
        int | None, typer.Option(min=0, help="Number of weeks of which to keep the last.")
    ] = None,
    monthly: Annotated[
        int | None, typer.Option(min=0, help="Number of months of which to keep the last.")
    ] = None,
    minimum_age: Annotated[
        str | None, typer.Option(help="Age below which none is deleted: 24h.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="Beginning of the snapshots' names.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", metavar="KEY=VALUE")] = None,
    paused: Annotated[bool, typer.Option("--paused", help="Set it, but let it rest.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make or replace the schedule of an instance."""
    if bool(every) == bool(cron):
        raise typer.BadParameter("say when: --every 6h, or --cron '0 3 * * *'")
    policy = {
        "keep_last": keep_last, "hourly": hourly, "daily": daily, "weekly": weekly,
        "monthly": monthly, "minimum_age": minimum_age,
    }  # fmt: skip
    if not _given({**policy, "max_count": max_count, "max_age": max_age}):
        raise typer.BadParameter(
            "say what to keep: --max-count, --max-age, --keep-last, --daily, …"
        )
    body = {
        "interval": every,
        "cron": cron,
        "retention": _given({"max_count": max_count, "max_age": max_age}),
        "policy": _given(policy),
        "name_prefix": prefix,
        "metadata": parse_pairs(tag, "--tag") or None,
        "paused": paused,
    }
    _show(context.obj.request("PUT", _path(instance), body=_given(body)), as_json)


@app.command()
def pause(context: typer.Context, instance: Reference, as_json: JsonFlag = False) -> None:
    """Let a schedule rest; it can still be run by hand."""
    _set_paused(context.obj, instance, True, as_json)


@app.command()
def resume(context: typer.Context, instance: Reference, as_json: JsonFlag = False) -> None:
    """Let a schedule go on; what it missed is not made up for."""
    _set_paused(context.obj, instance, False, as_json)


@app.command()
def run(context: typer.Context, instance: Reference, as_json: JsonFlag = False) -> None:
    """Take the schedule's next snapshot now, and apply its retention."""
    with output.working(f"capturing {instance}"):
        done = context.obj.request("POST", _path(instance, "run"))
    _show(done, as_json)


@app.command()
def explain(context: typer.Context, instance: Reference, as_json: JsonFlag = False) -> None:
    """Say which snapshots retention would delete now, which it keeps, and why."""
    plan = context.obj.request("GET", _path(instance, "retention"))
    if as_json:
        output.print_json(plan)
        return
    output.print_table(
        ("NAME", "ID", "AGE", "VERDICT", "FREES", "WHY"),
        [
            (s.get("name"), s["snapshot_id"], output.age(s["created_at"]),
             "keep" if s["keep"] else "delete", format_size(s["bytes_freed"]),
             "; ".join(s["reasons"]))
            for s in plan["snapshots"]
        ],
    )  # fmt: skip
    freed = format_size(plan["bytes_freed"])
    output.say(f"{plan['kept']} kept, {plan['deleted']} would go and free {freed}")


@app.command()
def rm(context: typer.Context, instances: list[str]) -> None:
    """End schedules; the snapshots they took stay."""

    def end(instance: str) -> None:
        context.obj.request("DELETE", _path(instance))
        print(instance)

    output.each(instances, "ending the schedule of", end)


def _path(instance: str, *more: str) -> str:
    return instance_path(instance, "snapshot-schedule", *more)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, {})}


def _set_paused(client: Client, instance: str, paused: bool, as_json: bool) -> None:
    """PUT replaces the whole schedule, so the rest of it is sent back as it is."""
    current: dict[str, Any] = client.request("GET", _path(instance))
    kept = ("retention", "policy", "name_prefix", "metadata")
    rhythm = "cron" if "cron" in current else "interval"
    body = {key: current[key] for key in (*kept, rhythm) if key in current}
    body["paused"] = paused
    _show(client.request("PUT", _path(instance), body=body), as_json)


def _show(schedule: dict[str, Any], as_json: bool) -> None:
    output.print_json(schedule) if as_json else output.print_facts(schedule)
