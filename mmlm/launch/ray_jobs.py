"""A command as a job of a Ray cluster: submit, follow its log, bring its end back.

The job is the same command that would run here, started on the cluster's head node. Its paths (`--out`, `--data`, a
story's folder, the Python environment) must mean the same there: shared storage (NFS and the like), the same image,
or the same machine. The tracking URI must be one that the cluster reaches.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import GateFailed, Interrupted, LaunchError, MmlmError
from mmlm.launch.ray_train import STOP_SECONDS, STOP_WAIT
from mmlm.world import quiet_environment

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROBE_SECONDS = 5.0
POLL_SECONDS = 1.0
START = "start one (`ray start --head`), or give the address of its dashboard, such as http://127.0.0.1:8265"


class JobFailed(LaunchError):
    """The command ended badly inside the job. `exit_code` is the command's own."""

    exit_code = 1


class JobRefused(JobFailed):
    """The command ended inside the job with exit code 2: wrong input."""

    exit_code = 2


def submit(
    command: list[str],
    address: str,
    *,
    env: dict[str, str] | None = None,
    follow: bool = True,
    stop_on_interrupt: bool = False,
) -> str:
    """Submit `command` to the Ray cluster whose dashboard is at `address`; with `follow`, wait for its end.

    Returns the last status seen ("SUCCEEDED", or "PENDING" without `follow`). The log goes to stdout. Raises
    LaunchError when the cluster cannot be reached (within PROBE_SECONDS) or the job failed, and Interrupted when this
    process is stopped while it follows: the job goes on then, or with `stop_on_interrupt` it was stopped and has ended.
    """
    address = probe(address)
    client = _client(address)
    try:
        job = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"env_vars": job_environment(env or {})},
            metadata={"mmlm": " ".join(command[1:6])},
        )
    except (RuntimeError, ConnectionError, OSError) as error:
        raise LaunchError(
            f"{address} refuses the job: {_first_line(error)}", cure="see the cluster's dashboard"
        ) from None
    _say(f"job {job} submitted to {address}")
    if not follow:
        return "PENDING"
    try:
        status = asyncio.run(_follow(client, job))
    except (KeyboardInterrupt, Interrupted):
        raise _interrupted(client, job, address, stop_on_interrupt) from None
    _conclude(client, job, status)
    return status


def probe(address: str) -> str:
    """The address as a URL at which a Ray dashboard answered just now. Raises LaunchError otherwise."""
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")):
        raise LaunchError(f"{address} is not a job address", wanted="http://HOST:8265", cure=START)
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/version", timeout=PROBE_SECONDS) as reply:
            known = "ray_version" in json.loads(reply.read(65536))
    except urllib.error.HTTPError as error:
        known = error.code in (401, 403)  # a cluster that wants a token: the client sends it
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise LaunchError(f"no Ray cluster answers at {url} ({reason})", cure=START) from None
    if not known:
        raise LaunchError(f"what answers at {url} is not a Ray cluster", cure=START)
    return url.rstrip("/")


def job_environment(extra: dict[str, str]) -> dict[str, str]:
    """What the job gets beside the cluster's own environment: telemetry off, time to save, this checkout on the path."""
    environment = {**quiet_environment(), "PYTHONUNBUFFERED": "1"}
    environment[STOP_WAIT] = os.environ.get(STOP_WAIT, f"{STOP_SECONDS:.0f}")
    if os.environ.get("MMLM_STOP_FILE"):
        environment["MMLM_STOP_FILE"] = str(Path(os.environ["MMLM_STOP_FILE"]).resolve())
    root = Path(__file__).resolve().parents[2]
    if "site-packages" not in root.parts:
        environment["PYTHONPATH"] = str(root)
    if "RAY_AUTH_MODE" in os.environ:  # a driver must use the cluster's mode, not guess one
        environment["RAY_AUTH_MODE"] = os.environ["RAY_AUTH_MODE"]
    return {**environment, **extra}


def _client(address: str) -> JobSubmissionClient:
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except ImportError as error:
        raise LaunchError(f"Ray is not complete here ({error})", cure="pip install 'ray[default]'") from None
    except Exception as error:  # the client raises its own kinds: connection, version, token
        hint = (
            "set RAY_AUTH_MODE and the token as on the cluster"
            if "401" in str(error) or "oken" in str(error)
            else START
        )
        raise LaunchError(f"the cluster at {address} does not accept us: {_first_line(error)}", cure=hint) from None


async def _follow(client: JobSubmissionClient, job: str) -> str:
    """Print the job's log as it comes and return its last status. Losing the log stream is no end: status is polled."""
    tail = asyncio.create_task(_print_log(client, job))
    lost_since: float | None = None
    while True:
        try:
            status = client.get_job_status(job)
            lost_since = None
        except (RuntimeError, ConnectionError, OSError) as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > 60:
                raise LaunchError(
                    f"the cluster no longer answers ({_first_line(error)})", cure=f"see later: ray job status {job}"
                ) from None
            status = None
        if status is not None and status.is_terminal():
            break
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.wait([tail], timeout=10)  # the rest of the log
    tail.cancel()
    return str(status.value)


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    import aiohttp

    try:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        _say(f"the log stream of {job} was lost ({_first_line(error)}); the job goes on")


def _interrupted(client: JobSubmissionClient, job: str, address: str, stop: bool) -> Interrupted:
    where = f"--address {address} {job}"
    if not stop:
        return Interrupted(
            f"the job {job} goes on without us",
            cure=f"follow it with `ray job logs -f {where}`, stop it with `ray job stop {where}`",
        )
    try:
        client.stop_job(job)
        _say(f"the job {job} is asked to stop; it saves first (Ctrl-C: do not wait for it)")
        while not client.get_job_status(job).is_terminal():
            time.sleep(POLL_SECONDS)
        return _stopped(client, job)
    except KeyboardInterrupt:
        return Interrupted(f"the job {job} was asked to stop", cure=f"see when it has ended: `ray job status {where}`")
    except (RuntimeError, ConnectionError, OSError) as error:
        return Interrupted(
            f"the job {job} could not be asked to stop, or not be seen ending ({_first_line(error)})",
            cure=f"`ray job status {where}`, `ray job stop {where}`",
        )


def _stopped(client: JobSubmissionClient, job: str) -> Interrupted:
    """That the job has ended because it was stopped, with its own last word."""
    said = _last_word(client, job)
    return Interrupted(
        f"the job {job} was stopped" + (f": {said}" if said else ""),
        cure="" if "run the same command again" in said else "run the same command again to go on",
    )


def _last_word(client: JobSubmissionClient, job: str) -> str:
    said = [line for line in client.get_job_logs(job).splitlines() if line.startswith("mmlm: ")]
    return said[-1].removeprefix("mmlm: ") if said else ""


def _conclude(client: JobSubmissionClient, job: str, status: str) -> None:
    """Return when the job succeeded, else raise what the command's exit code says."""
    if status == "SUCCEEDED":
        return
    if status == "STOPPED":
        raise _stopped(client, job)
    info: Any = client.get_job_info(job)
    code = info.driver_exit_code
    found = f"the job {job} ended with exit code {code}" if code is not None else f"the job {job} failed"
    found += f": {_last_word(client, job) or _first_line(info.message or 'no message')}"
    kinds: dict[int | None, type[MmlmError]] = {2: JobRefused, 3: GateFailed, 4: Interrupted}
    raise kinds.get(code, JobFailed)(found)


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
