"""Jobs and their files, in a store that outlives replicas and the server: SQLite, or any database SQLAlchemy reaches.

A job is claimed by one conditional UPDATE, so that several servers may share a store, and is held by a lease that its
worker renews; a worker that dies leaves a lease that runs out, and the job is begun again by whoever finds it.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sql

from avray.settings.serve import JobSettings

State = Literal["queued", "running", "succeeded", "failed"]
INPUT, OUTPUT = "input", "output"
"""The file sent along, and the one made."""
_ID = re.compile(r"job-[0-9a-f]{32}", re.ASCII)
_TABLE = sql.Table(
    "avray_jobs", sql.MetaData(),
    sql.Column("id", sql.String(40), primary_key=True), sql.Column("owner", sql.String(16), nullable=False),
    sql.Column("model", sql.String(100), nullable=False), sql.Column("state", sql.String(10), nullable=False),
    sql.Column("created", sql.Float, nullable=False), sql.Column("lease", sql.Float, nullable=False),
    sql.Column("expires", sql.Float, nullable=True), sql.Column("attempts", sql.Integer, nullable=False),
    sql.Column("progress", sql.Float, nullable=False), sql.Column("key", sql.String(300), nullable=True),
    sql.Column("digest", sql.String(64), nullable=True), sql.Column("document", sql.Text, nullable=False),
    sql.Index("avray_jobs_state", "state", "created"), sql.UniqueConstraint("owner", "key"))


@dataclass(frozen=True)
class Job:
    """``document`` is plain: the route, the body, the seed; later the result's headers, or the error."""

    owner: str
    model: str
    document: Mapping[str, Any]
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(16)}")
    state: State = "queued"
    created: float = field(default_factory=time.time)
    lease: float = 0.0
    expires: float | None = None
    attempts: int = 0
    progress: float = 0.0
    key: str | None = None
    digest: str | None = None


class JobStore:
    """Called from one thread at a time. Everything a job owns lies in ``folder/<id>``."""

    def __init__(self, settings: JobSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        url = settings.database or f"sqlite:///{self.folder / 'jobs.sqlite'}"
        self.engine = sql.create_engine(url, pool_pre_ping=True)
        if self.engine.dialect.name == "sqlite":
            sql.event.listen(self.engine, "connect", _pragmas)
        _TABLE.metadata.create_all(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    def add(self, job: Job, file: bytes | None) -> bool:
        """False where a job of the same owner and Idempotency-Key is there already."""
        (self.folder / job.id).mkdir()
        if file is not None:
            self.path(job.id, INPUT).write_bytes(file)
        try:
            with self.engine.begin() as connection:
                connection.execute(_TABLE.insert().values({**asdict(job), "document": json.dumps(job.document)}))
        except sql.exc.IntegrityError:
            shutil.rmtree(self.folder / job.id, ignore_errors=True)
            return False
        return True

    def path(self, job_id: str, name: str) -> Path:
        assert _ID.fullmatch(job_id) and "/" not in name
        return self.folder / job_id / name

    def get(self, job_id: str, owner: str) -> Job | None:
        if not _ID.fullmatch(job_id):
            return None
        return self._one((_TABLE.c.id == job_id) & (_TABLE.c.owner == owner))

    def by_key(self, owner: str, key: str) -> Job | None:
        return self._one((_TABLE.c.owner == owner) & (_TABLE.c.key == key))

    def waiting(self) -> int:
        with self.engine.connect() as connection:
            query = sql.select(sql.func.count()).where(_TABLE.c.state == "queued")
            return int(connection.execute(query).scalar_one())

    def claim(self, model: str) -> Job | None:
        """The model's oldest job that waits, or whose lease ran out, now running under a lease of ours."""
        now = time.time()
        free = (_TABLE.c.state == "queued") | ((_TABLE.c.state == "running") & (_TABLE.c.lease < now))
        job = self._one(free & (_TABLE.c.model == model))
        if job is None:
            return None
        changed = self._update(job.id, free, state="running", lease=now + self.settings.lease_s,
                               attempts=job.attempts + 1, progress=0.0)
        return self.get(job.id, job.owner) if changed else None

    def beat(self, job_id: str, progress: float) -> bool:
        """Renew the lease; False where the job is gone, and its work in vain."""
        return self._update(job_id, _TABLE.c.state == "running", lease=time.time() + self.settings.lease_s,
                            progress=progress)

    def release(self, job_id: str, attempts: int) -> None:
        """Back in the queue, for another attempt."""
        self._update(job_id, _TABLE.c.state == "running", state="queued", lease=0.0, attempts=attempts)

    def finish(self, job: Job, state: State, result: Mapping[str, Any]) -> None:
        self._update(job.id, _TABLE.c.state == "running", state=state, progress=1.0 if state == "succeeded" else 0.0,
                     expires=time.time() + self.settings.keep_s, document=json.dumps({**job.document, **result}))

    def delete(self, job_id: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(_TABLE.delete().where(_TABLE.c.id == job_id))
        shutil.rmtree(self.folder / job_id, ignore_errors=True)

    def expire(self) -> None:
        """Delete what has been kept long enough."""
        with self.engine.connect() as connection:
            rows = connection.execute(sql.select(_TABLE.c.id).where(_TABLE.c.expires < time.time())).all()
        for row in rows:
            self.delete(row.id)

    def _one(self, where: Any) -> Job | None:
        with self.engine.connect() as connection:
            query = sql.select(_TABLE).where(where).order_by(_TABLE.c.created).limit(1)
            row = connection.execute(query).mappings().first()
        return Job(**{**row, "document": json.loads(row["document"])}) if row else None

    def _update(self, job_id: str, where: Any, **values: Any) -> bool:
        with self.engine.begin() as connection:
            statement = _TABLE.update().where((_TABLE.c.id == job_id) & where).values(values)
            return connection.execute(statement).rowcount == 1


def _pragmas(connection: Any, record: Any) -> None:
    """Readers beside a writer, and writers that wait for each other."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")
