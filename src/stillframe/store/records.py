"""The records: instances, snapshots, images, schedules and intents in one SQLite database.

All records are also kept in memory, so reading and filtering never touches the disk; a write is
one ``BEGIN IMMEDIATE`` transaction with ``synchronous=FULL`` and happens before memory changes. A
record that cannot be read is set aside and reported; it never hides the others.

Intents are the journal: a verb of several steps writes one first and removes it with its commit, so
that what remains after a crash can be undone (``engine/recover.py``). Taking back what an intent
announced never fails: what cannot be written is owed, and goes with the next transaction. Until
then the intent stands for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from stillframe.model.errors import (
    Conflict,
    DamagedData,
    HostFailure,
    NameConflict,
    NotFound,
    StorageFull,
)
from stillframe.model.lineage import Forebear, bury
from stillframe.model.schedules import Schedule
from stillframe.model.values import ClockReading, Image, Instance, Snapshot

T = TypeVar("T")
Statement = tuple[str, tuple[str | None, ...]]
_UPDATE_SNAPSHOT = "UPDATE snapshots SET name = ?, document = ? WHERE id = ?"
_PUT_SCHEDULE = (
    "INSERT INTO schedules (instance_id, document) VALUES (?, ?) "
    "ON CONFLICT (instance_id) DO UPDATE SET document = excluded.document"
)
_PUT_INSTANCE = (
    "INSERT INTO instances (id, name, document) VALUES (?, ?, ?) "
    "ON CONFLICT (id) DO UPDATE SET name = excluded.name, document = excluded.document"
)
log = logging.getLogger("stillframe.records")

_MIGRATIONS = (
    """
    CREATE TABLE instances (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, document TEXT NOT NULL
    ) STRICT;
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY, source_instance_id TEXT NOT NULL, name TEXT, document TEXT NOT NULL,
        UNIQUE (source_instance_id, name)
    ) STRICT;
    CREATE TABLE images (
        name TEXT PRIMARY KEY, digest TEXT NOT NULL, document TEXT NOT NULL
    ) STRICT;
    CREATE TABLE intents (
        subject TEXT PRIMARY KEY, verb TEXT NOT NULL, document TEXT NOT NULL
    ) STRICT;
    """,
    # A schedule outlives its instance while its snapshots do, so it refers to none.
    """
    CREATE TABLE schedules (instance_id TEXT PRIMARY KEY, document TEXT NOT NULL) STRICT;
    CREATE TABLE forebears (id TEXT PRIMARY KEY, document TEXT NOT NULL) STRICT;
    """,
    # At most one row: what the next server needs to judge its clock by.
    "CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 1), document TEXT NOT NULL) STRICT;",
)


@dataclass(frozen=True, slots=True)
class Intent:
    """A verb under way: its subject's id and what is needed to undo it."""

    subject: str
    verb: str
    facts: Mapping[str, str]


def _insertion(intent: Intent) -> Statement:
    return (
        "INSERT INTO intents (subject, verb, document) VALUES (?, ?, ?)",
        (intent.subject, intent.verb, json.dumps(dict(intent.facts))),
    )


def _unwritten(error: sqlite3.Error) -> HostFailure:
    kind = StorageFull if "full" in str(error) else HostFailure
    return kind(f"the records could not be written: {error}", hint="check the data directory")


_ADAPTERS: dict[type, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind)
    for kind in (Instance, Snapshot, Image, Schedule, Forebear, ClockReading)
}

_FACTS = TypeAdapter(dict[str, str])


def to_json(value: object) -> str:
    """A model value as JSON text."""
    return _ADAPTERS[type(value)].dump_json(value).decode()


def from_json(kind: type[T], text: str | bytes) -> T:
    """A model value from JSON text; unknown fields are ignored. Raises DamagedData."""
    try:
        value: T = _ADAPTERS[kind].validate_json(text)
    except ValidationError as error:
        raise DamagedData(f"a stored {kind.__name__.lower()} record cannot be read") from error
    return value


class Records:
    """The server's memory of what exists. Used from the event loop's thread only."""

    def __init__(self, database: Path) -> None:
        """Open (or create) the database. Raises HostFailure when it is newer than this program."""
        self._connection = sqlite3.connect(database, isolation_level=None, timeout=10)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        # A flipped bit may have made a key no UTF-8; then it matches nothing, which is as it is.
        self._connection.text_factory = lambda text: text.decode(errors="replace")
        self._owed: list[Statement] = []
        self._migrate()
        self.damaged: list[tuple[str, str]] = []  # (table, id) of unreadable records
        self.instances = self._load("instances", Instance)
        self.snapshots = self._load("snapshots", Snapshot)
        self.schedules = self._load("schedules", Schedule, key="instance_id")
        self.forebears = self._load("forebears", Forebear)
        self._images = {i.name: i for i in self._load("images", Image, key="name").values()}
        self.intents = self._load_intents()
        self.clock = self._load_clock()
        self._names = {i.name: i.id for i in self.instances.values()}

    def _migrate(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise HostFailure(
                f"the data directory has format {version}, this program knows {len(_MIGRATIONS)}",
                hint="run a newer stillframe",
            )
        for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            try:
                self._connection.executescript(
                    f"BEGIN IMMEDIATE; {script} PRAGMA user_version={number}; COMMIT;"
                )
            except sqlite3.Error as error:
                raise _unwritten(error) from error

    def _load(self, table: str, kind: type[T], key: str = "id") -> dict[str, T]:
        found: dict[str, T] = {}
        rows = self._connection.execute(
            # As bytes: what is no UTF-8 is a damaged record, not one with another letter in it.
            f"SELECT {key}, CAST(document AS BLOB) "  # noqa: S608 - constants only
            f"FROM {table} ORDER BY rowid"
        )
        for identifier, document in rows:
            try:
                value = from_json(kind, document)
            except DamagedData:
                self.damaged.append((table, identifier))
                continue
            if getattr(value, key) == identifier:
                found[identifier] = value
            else:
                self.damaged.append((table, identifier))
        return found

    def _load_intents(self) -> dict[str, Intent]:
        """The journal. One whose facts cannot be read has none: subject and verb stand apart."""
        rows = self._connection.execute(
            "SELECT subject, verb, CAST(document AS BLOB) FROM intents ORDER BY rowid"
        )
        found = {}
        for subject, verb, document in rows:
            try:
                facts = _FACTS.validate_json(document)
            except ValidationError:
                log.error("the facts of %s of %s cannot be read", verb, subject)
                facts = {}
            found[subject] = Intent(subject, verb, facts)
        return found

    def _load_clock(self) -> ClockReading | None:
        """The reading of an earlier server; one that cannot be read is as good as none."""
        row = self._connection.execute("SELECT CAST(document AS BLOB) FROM clock").fetchone()
        if row is None:
            return None
        try:
            reading = from_json(ClockReading, row[0])
        except DamagedData as error:
            log.error("%s; the newest record tells the time", error)
            return None
        aware = reading.believed.tzinfo is not None and reading.wall.tzinfo is not None
        return reading if aware else None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable transaction. Raises StorageFull or HostFailure, having changed nothing."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in self._owed:
                self._connection.execute(*statement)
            yield self._connection
            self._connection.execute("COMMIT")
            self._owed.clear()
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.IntegrityError):
                raise NameConflict("the name is already in use") from error
            if isinstance(error, sqlite3.Error):
                self._supersede()
                raise _unwritten(error) from error
            raise

    def _supersede(self) -> None:
        """Overwrite a commit that failed, before anybody acts on its failure.

        When only its fsync failed, it lies complete in the write-ahead log, and whoever opens the
        database after a crash would take it for done. The next commit is written in its place.
        """
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(f"PRAGMA user_version={len(_MIGRATIONS)}")
            self._connection.execute("COMMIT")
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")

    def _now_or_later(self, *statements: Statement) -> None:
        """Execute statements that must not fail: if they do now, with the next transaction."""
        try:
            with self.transaction() as sql:
                for statement in statements:
                    sql.execute(*statement)
        except HostFailure as error:
            log.warning("%s; it is tried again with the next change", error)
            self._owed.extend(statements)

    # -- instances ----------------------------------------------------------------------------
    def instance_by_name(self, name: str) -> Instance | None:
        """The instance that bears ``name``, in any state of its life."""
        identifier = self._names.get(name)
        return self.instances.get(identifier) if identifier else None

    def put_instance(
        self,
        instance: Instance,
        *,
        fulfils: str | None = None,
        intent: Intent | None = None,
        can_wait: bool = False,
    ) -> None:
        """Write an instance durably, removing the intent of subject ``fulfils`` with it.

        ``intent`` is one that begins with it. With ``can_wait`` it is written later if it cannot be
        now. Raises NameConflict when another instance has the name, Conflict when there is no
        intent to fulfil: it was called off.
        """
        if fulfils is not None and fulfils not in self.intents:
            raise Conflict("it was deleted while it was being made", id=fulfils)
        statements: list[Statement] = [
            (_PUT_INSTANCE, (instance.id, instance.name, to_json(instance)))
        ]
        if fulfils is not None:
            statements.append(("DELETE FROM intents WHERE subject = ?", (fulfils,)))
        if intent is not None:
            statements.append(_insertion(intent))
        if can_wait:
            self._now_or_later(*statements)
        else:
            with self.transaction() as sql:
                for statement in statements:
                    sql.execute(*statement)
        self.instances[instance.id] = instance
        self._names[instance.name] = instance.id
        if fulfils is not None:
            self.intents.pop(fulfils, None)
        if intent is not None:
            self.intents[intent.subject] = intent

    def reserve_instance(self, instance: Instance, intent: Intent) -> None:
        """Take the instance's name and record the intent to make it, in one transaction."""
        with self.transaction() as sql:
            sql.execute(
                "INSERT INTO instances (id, name, document) VALUES (?, ?, ?)",
                (instance.id, instance.name, to_json(instance)),
            )
            self._insert_intent(sql, intent)
        self.instances[instance.id] = instance
        self._names[instance.name] = instance.id
        self.intents[intent.subject] = intent

    def drop_instance(self, instance_id: str) -> None:
        """Forget an instance and its intent; unknown ids are fine."""
        self._now_or_later(
            ("DELETE FROM instances WHERE id = ?", (instance_id,)),
            ("DELETE FROM intents WHERE subject = ?", (instance_id,)),
        )
        gone = self.instances.pop(instance_id, None)
        self.intents.pop(instance_id, None)
        if gone is not None and self._names.get(gone.name) == instance_id:
            del self._names[gone.name]

    # -- snapshots ----------------------------------------------------------------------------
    def snapshot_name_taken(self, source_instance_id: str, name: str) -> bool:
        """Whether the source has a snapshot, finished or being made, of that name."""
        wanted = {"source": source_instance_id, "name": name}
        return any(
            s.source_instance_id == source_instance_id and s.name == name
            for s in self.snapshots.values()
        ) or any(
            i.verb == "snapshot" and wanted.items() <= i.facts.items()
            for i in self.intents.values()
        )

    def put_snapshot(self, snapshot: Snapshot, *, head: bool = False) -> None:
        """Write a snapshot durably, fulfilling its intent. Raises NameConflict.

        With ``head`` its source, if there is one, gets it as its head in the same transaction.
        """
        source = self.instances.get(snapshot.source_instance_id) if head else None
        with self.transaction() as sql:
            sql.execute(
                "INSERT INTO snapshots (id, source_instance_id, name, document) "
                "VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "name = excluded.name, document = excluded.document",
                (snapshot.id, snapshot.source_instance_id, snapshot.name, to_json(snapshot)),
            )
            sql.execute("DELETE FROM intents WHERE subject = ?", (snapshot.id,))
            if source is not None:
                source = replace(source, head_snapshot_id=snapshot.id)
                sql.execute(
                    "UPDATE instances SET document = ? WHERE id = ?", (to_json(source), source.id)
                )
        self.snapshots[snapshot.id] = snapshot
        self.intents.pop(snapshot.id, None)
        if source is not None:
            self.instances[source.id] = source

    def update_snapshot(self, snapshot: Snapshot, *, can_wait: bool = False) -> None:
        """Write what changed of a known snapshot, leaving any intent. Raises NameConflict.

        ``can_wait`` as in ``put_instance``.
        """
        update = (_UPDATE_SNAPSHOT, (snapshot.name, to_json(snapshot), snapshot.id))
        if can_wait:
            self._now_or_later(update)
        else:
            with self.transaction() as sql:
                sql.execute(*update)
        self.snapshots[snapshot.id] = snapshot

    def drop_snapshot(self, snapshot_id: str, intent: Intent | None = None) -> None:
        """Forget a snapshot; with ``intent`` (its removal) in the same transaction.

        While others descend from it, it is remembered as their forebear.
        """
        forebears = bury(
            self.forebears, self.snapshots.get(snapshot_id), self._referred(without=snapshot_id)
        )
        with self.transaction() as sql:
            sql.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))
            if intent is not None:
                self._insert_intent(sql, intent)
            self._write_forebears(sql, forebears)
        self.snapshots.pop(snapshot_id, None)
        self.forebears = forebears
        if intent is not None:
            self.intents[intent.subject] = intent

    def _referred(self, *, without: str) -> Iterator[str | None]:
        for snapshot in self.snapshots.values():
            if snapshot.id != without:
                yield snapshot.parent_snapshot_id
        for instance in self.instances.values():
            yield instance.parent_snapshot_id
            yield instance.head_snapshot_id

    def _write_forebears(self, sql: sqlite3.Connection, forebears: Mapping[str, Forebear]) -> None:
        for identifier in self.forebears.keys() - forebears.keys():
            sql.execute("DELETE FROM forebears WHERE id = ?", (identifier,))
        for forebear in forebears.values():
            if self.forebears.get(forebear.id) != forebear:
                sql.execute(
                    "INSERT OR REPLACE INTO forebears (id, document) VALUES (?, ?)",
                    (forebear.id, to_json(forebear)),
                )

    # -- schedules ----------------------------------------------------------------------------
    def put_schedule(self, schedule: Schedule, *, can_wait: bool = False) -> None:
        """Write a schedule durably under its instance's id; ``can_wait`` as in ``put_instance``."""
        put = (_PUT_SCHEDULE, (schedule.instance_id, to_json(schedule)))
        if can_wait:
            self._now_or_later(put)
        else:
            with self.transaction() as sql:
                sql.execute(*put)
        self.schedules[schedule.instance_id] = schedule

    def drop_schedule(self, instance_id: str) -> None:
        """Forget the schedule of an instance; none is fine."""
        with self.transaction() as sql:
            sql.execute("DELETE FROM schedules WHERE instance_id = ?", (instance_id,))
        self.schedules.pop(instance_id, None)

    # -- the clock ----------------------------------------------------------------------------
    def put_clock(self, reading: ClockReading) -> None:
        """Keep a reading for the next server. One that cannot be written is let go."""
        try:
            with self.transaction() as sql:
                sql.execute(
                    "INSERT OR REPLACE INTO clock (id, document) VALUES (1, ?)",
                    (to_json(reading),),
                )
        except HostFailure as error:
            log.warning("%s; the time is kept later", error)  # by a newer reading
            return
        self.clock = reading

    # -- images -------------------------------------------------------------------------------
    def put(self, image: Image, *, fulfils: str | None = None, can_wait: bool = False) -> None:
        """Write an image under its name, removing the intent of subject ``fulfils`` with it.

        With ``can_wait`` it is written later if it cannot be now.
        """
        put: Statement = (
            "INSERT OR REPLACE INTO images (name, digest, document) VALUES (?, ?, ?)",
            (image.name, image.digest, to_json(image)),
        )
        if can_wait:
            self._now_or_later(put)
        else:
            with self.transaction() as sql:
                sql.execute(*put)
                if fulfils is not None:
                    sql.execute("DELETE FROM intents WHERE subject = ?", (fulfils,))
        self._images[image.name] = image
        if fulfils is not None:
            self.intents.pop(fulfils, None)

    def get(self, name: str) -> Image | None:
        """The image of that name."""
        return self._images.get(name)

    def list(self) -> list[Image]:
        """All images, oldest first."""
        return sorted(self._images.values(), key=lambda image: image.created_at)

    def delete(self, name: str, intent: Intent | None = None, *, can_wait: bool = False) -> None:
        """Forget an image name; with ``intent`` in the same transaction. Raises NotFound.

        With ``can_wait`` it is forgotten durably later if it cannot be now.
        """
        if name not in self._images:
            raise NotFound(f"no image {name!r}")
        forget: Statement = ("DELETE FROM images WHERE name = ?", (name,))
        if can_wait:
            self._now_or_later(forget)
        else:
            with self.transaction() as sql:
                sql.execute(*forget)
                if intent is not None:
                    self._insert_intent(sql, intent)
        del self._images[name]
        if intent is not None:
            self.intents[intent.subject] = intent

    # -- what they refer to -------------------------------------------------------------------
    def need_image(self, digest: str) -> bool:
        """Whether an instance, a snapshot or a verb under way refers to the image, or may."""
        return self._need("image", digest, lambda instance: instance.image_digest)

    def need_boot_pair(self, digest: str) -> bool:
        """Whether an instance, a snapshot or a verb under way refers to the pair, or may."""
        return self._need("boot", digest, lambda instance: instance.boot)

    def _need(self, fact: str, digest: str, of: Callable[[Instance], str]) -> bool:
        templates = (snapshot.template for snapshot in self.snapshots.values())
        return (
            bool(self.damaged)  # nobody knows what these refer to
            or any(of(one) == digest for one in (*self.instances.values(), *templates))
            or any(intent.facts.get(fact) == digest for intent in self.intents.values())
        )

    # -- intents ------------------------------------------------------------------------------
    def intend(self, intent: Intent) -> None:
        """Record durably that a verb begins. Raises NameConflict when its subject has one."""
        with self.transaction() as sql:
            self._insert_intent(sql, intent)
        self.intents[intent.subject] = intent

    def amend(self, subject: str, facts: Mapping[str, str]) -> None:
        """Add facts to an intent durably, before what they announce. Raises as ``transaction``."""
        intent = self.intents[subject]
        amended = replace(intent, facts={**intent.facts, **facts})
        with self.transaction() as sql:
            sql.execute(
                "UPDATE intents SET document = ? WHERE subject = ?",
                (json.dumps(dict(amended.facts)), subject),
            )
        self.intents[subject] = amended

    def fulfil(self, subject: str) -> None:
        """Remove an intent: its verb is done or undone."""
        if subject in self.intents:
            self._now_or_later(("DELETE FROM intents WHERE subject = ?", (subject,)))
            del self.intents[subject]

    @staticmethod
    def _insert_intent(sql: sqlite3.Connection, intent: Intent) -> None:
        sql.execute(*_insertion(intent))

    def close(self) -> None:
        """Close the database."""
        self._connection.close()
