"""A command on a cluster, through Ray Jobs: it goes on when nobody listens, and its log, end and summary come here.

    python pipelines/train.py cluster=cluster.yaml data.path=s3://… run.dir=/shared/runs/a
    python -m avray.jobs follow|status|stop ID cluster.yaml

``cluster=`` with a YAML file (the one that ``ray up`` took: its dashboard is reached through SSH) or the address of a
dashboard (``http://…``) sends the command there; anything else joins a Ray from this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avray.cluster_file import problems
from avray.errors import MissingDependency

EXCLUDES = ["**/.?*", "**/__pycache__", "**/*.egg-info", "/runs", "/cache"]
"""Of the folder that travels."""
PATHS = ("data.path", "data.cache", "data.texts", "checkpoint", "audio", "output", "init_from")
CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk",
          "ray._private.runtime_env.packaging")
"""Of Ray's loggers: those that say every file that stays here, and how connections end."""
RUN_DIR = "run_dir"
"""Of a job's metadata."""
RETRY_S = 2.0
REQUEST_S = 30.0
SILENCE_S = 60.0
"""Without a line, after which the log is asked for anew."""
WORDS = ("follow", "status", "stop")


def is_remote(cluster: str | None) -> bool:
    """Whether ``cluster`` is a place to send the command to."""
    return (cluster is not None and cluster.startswith(("http://", "https://"))) or is_file(cluster)


def is_file(cluster: str | None) -> bool:
    return cluster is not None and cluster.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class Job:
    """What is sent: ``script`` in ``folder``, and its command line, with ``cluster=auto`` in place of the cluster."""

    folder: Path
    script: str
    arguments: tuple[str, ...]
    run_dir: str

    @property
    def entrypoint(self) -> str:
        return f"python {self.script} {shlex.join([*self.arguments, 'cluster=auto'])}"


def job_of(script: Path, arguments: Sequence[str]) -> Job:
    """ValueError for a path that could not mean the same on the cluster, and for a run without a place to stay."""
    given = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    for key in ("run.dir", *PATHS):
        value = given.get(key, "")
        if value and not value.startswith("/") and "://" not in value:
            raise ValueError(f"{key}={value} is relative to this machine: on a cluster it has to be a URL, or a path "
                             "that every node sees.")
    if "run.dir" not in given:
        raise ValueError("run.dir is not given: on a cluster the results need a folder that every node sees.")
    kept = tuple(argument for argument in arguments if argument.partition("=")[0].lstrip("+") != "cluster")
    script = script.resolve()
    return Job(script.parents[1], str(script.relative_to(script.parents[1])), kept, given["run.dir"])


@contextlib.contextmanager
def connected(cluster: str) -> Iterator[Any]:
    """A client of the cluster's Jobs. ValueError where there is none, or one that wants another token."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Whose requests end: Ray's own wait for ever on a connection that a sleeping machine has lost."""

        def _do_request(self, method: str, endpoint: str, **fields: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=REQUEST_S, **fields)

    # This user's token, where there is one; RAY_AUTH_MODE, set here, would come too late for a Ray imported before.
    token = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
    with _tunnel(cluster) if is_file(cluster) else contextlib.nullcontext(cluster) as address:
        try:
            client = Client(address, headers=token)
            for name in CHATTY:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield client
        except ConnectionError as error:
            raise ValueError(f"cluster={cluster} does not answer: is it up, and is this the address of its dashboard "
                             f"(port 8265)? ({error})") from None
        except AuthenticationError as error:
            raise ValueError(f"cluster={cluster} wants a token, and the one in ~/.ray/auth_token, if any, is another: "
                             f"bring the one that it was started with. ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def _tunnel(cluster: str) -> Iterator[str]:
    """The dashboard of the cluster that a file describes, on a port of this machine, through SSH."""
    if found := problems(cluster):
        raise ValueError(f"cluster={cluster} is not fit to be used: {' '.join(found)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "dashboard", cluster, "--port", str(port)]
    # In a session of its own and not into a pipe: the ssh that it starts outlives it, and would keep a pipe open.
    with tempfile.TemporaryFile("w+") as said:
        tunnel = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
                                  start_new_session=True)
        try:
            for _ in range(240):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                    break
                if tunnel.poll() is not None:
                    said.seek(0)
                    raise ValueError(f"cluster={cluster}: no way to its dashboard (ray up {cluster} first?): "
                                     f"{' '.join(said.read().split())[-400:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tunnel.pid, signal.SIGTERM)
            tunnel.wait()


def run(cluster: str, name: str, job: Job) -> int:
    """Send the job, print its log as it comes, bring its summary into ``runs/``. Returns its exit code."""
    with connected(cluster) as client:
        submission = f"avray-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        environment = {"working_dir": str(job.folder), "excludes": EXCLUDES}
        _submit(client, submission, job.entrypoint, environment, {RUN_DIR: job.run_dir})
        print(f"Job {submission} on {cluster}. It goes on without this terminal: "
              f"python -m avray.jobs follow|status|stop {submission} {cluster}", flush=True)
        return follow(client, submission)


def _submit(client: Any, submission: str, entrypoint: str, environment: Mapping[str, Any] | None = None,
            metadata: Mapping[str, str] | None = None) -> None:
    """Patiently: a head that has just started has nobody yet to start jobs, and may leave a request without answer."""
    for is_last in [False] * 30 + [True]:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=submission, runtime_env=environment,
                              metadata=metadata)
            return
        except (OSError, RuntimeError) as error:
            if "already" in str(error):  # the request before this one had arrived
                return
            if is_last or not (isinstance(error, OSError) or "No available agent" in str(error)):
                raise
            time.sleep(RETRY_S)


def follow(client: Any, submission: str) -> int:
    """Print a job's log until it ends, through lost connections, and bring its summary into ``runs/``; its exit code,
    130 if it was stopped. ValueError for a job that the cluster does not know (any more)."""
    import aiohttp

    num_shown, is_lost = 0, False

    async def tail() -> None:
        nonlocal num_shown, is_lost
        num_seen = 0  # a new connection begins with the first line again
        pieces = client.tail_job_logs(submission)
        while (piece := await asyncio.wait_for(anext(pieces, None), SILENCE_S)) is not None:
            is_lost = False
            new = piece[max(0, num_shown - num_seen):]
            num_seen += len(piece)
            num_shown = max(num_shown, num_seen)
            print(new, end="", flush=True)

    while True:
        try:
            client.get_job_info(submission)  # the log of an unknown job would only fail to open, as on a lost line
            with contextlib.suppress(TimeoutError):  # nothing to say, or nobody there any more
                asyncio.run(tail())
            details = client.get_job_info(submission)
        except (TimeoutError, OSError, RuntimeError, aiohttp.ClientError) as error:
            if "does not exist" in str(error):
                raise ValueError(f"The cluster knows no job {submission}: was it started anew?") from None
            if not is_lost:
                print(f"The connection is lost ({type(error).__name__}); the job goes on. Trying again.",
                      file=sys.stderr)
            is_lost = True
            time.sleep(RETRY_S)
            continue
        if details.status.is_terminal():
            if str(details.status.value) == "SUCCEEDED" and RUN_DIR in (details.metadata or {}):
                _bring_summary(client, submission, details.metadata[RUN_DIR])
            return exit_code(str(details.status.value), details.driver_exit_code)


def exit_code(status: str, driver: int | None) -> int:
    """Of a job that ended."""
    return {"SUCCEEDED": 0, "STOPPED": 130}.get(status, driver or 5)


def _bring_summary(client: Any, submission: str, run_dir: str) -> None:
    """``run_dir``/summary.json, by a job that prints it, since nobody else need be able to read that folder."""
    read = "import sys, fsspec; print(fsspec.open(sys.argv[1]).open().read().decode())"
    reader = f"{submission}-summary"
    _submit(client, reader, f"python -c {shlex.quote(read)} {shlex.quote(run_dir + '/summary.json')}")
    _wait_ended(client, reader)
    log = client.get_job_logs(reader)
    with contextlib.suppress(ValueError):
        summary: Mapping[str, Any] = json.loads(log[log.index("{"):])
        path = Path("runs") / Path(run_dir).name / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1))
        print(f"Its summary is in {path.absolute()}", flush=True)


def _wait_ended(client: Any, submission: str) -> None:
    """A minute at most."""
    for _ in range(120):
        if client.get_job_status(submission).is_terminal():
            break
        time.sleep(0.5)


def main(arguments: Sequence[str]) -> int:
    """``follow``, ``status`` or ``stop`` a job."""
    if len(arguments) != 3 or arguments[0] not in WORDS:
        raise ValueError(f"python -m avray.jobs {'|'.join(WORDS)} ID cluster.yaml")
    word, submission, cluster = arguments
    with connected(cluster) as client:
        if word == "follow":
            return follow(client, submission)
        if word == "stop":
            client.stop_job(submission)
            _wait_ended(client, submission)
        print(f"{submission}: {client.get_job_status(submission).value}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError, MissingDependency) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
