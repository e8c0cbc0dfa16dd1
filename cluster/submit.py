"""Submits a command of ray-dfml as a job under an id of your choice, follows it, and ends with its exit code.

    python cluster/submit.py --id free-1 -- train free --pool /shared/pools/mine --run-dir /shared/runs/free-1

The same line may be given again at any time. A job that runs under this id is followed, not started a second time. One
that has ended is submitted anew, and `train` then goes on with the run in its folder, or shows the scores of a run that
is done. Ctrl-C leaves the job running; `--stop` stops it, and its run can go on later.

The address is that of the dashboard: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265. The token is in RAY_AUTH_TOKEN,
in the file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token.

Exit codes are those of ray-dfml; 130 if the job was stopped, 5 if the cluster cannot be reached or lost the job.
"""

import argparse
import asyncio
import os
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported; without it a client sends no token
from aiohttp import ClientError
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

GRACE_SECONDS = 60
"""How long a job that is stopped may take to write how far it is; Ray's own 3 s are too few."""

MOST_BYTES = 10 * 2**20
"""Largest working directory. Code is in the image, and pools and data are at addresses that every node reaches."""

LOST, STOPPED = 5, 130


def main() -> int:
    """Submit, follow, and return the exit code."""
    options = parse(sys.argv[1:])
    try:
        client = JobSubmissionClient(options.address)
        if options.stop:
            client.stop_job(options.id)
            return follow(client, options.id)
        start(client, options)
        return 0 if options.no_wait else follow(client, options.id)
    except KeyboardInterrupt:
        print(f"submit: the job goes on; follow it with the same command, or stop it with --id {options.id} --stop")
        return STOPPED
    except (OSError, ClientError, RayError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"submit: {options.address}: {reason}", file=sys.stderr)
        return LOST


def parse(words: list[str]) -> argparse.Namespace:
    """The options, with `entrypoint`, the command line of the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--id", required=True, help="submission id; letters, digits, - and _")
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    parser.add_argument("--address", default=address, help="the dashboard, such as http://127.0.0.1:8265")
    parser.add_argument("--working-dir", type=Path, help="small folder that the job starts in, such as one of sweeps")
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="variable to hand on; repeatable")
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    parser.add_argument("--stop", action="store_true", help="stop the job of this id instead")
    parser.add_argument("command", nargs="*", help="what follows ray-dfml, after --")
    options = parser.parse_args(words)
    if not options.command and not options.stop:
        parser.error("give the command after --, such as: -- train free --pool P --run-dir R --workers 16")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", options.id):
        parser.error(f"--id {options.id}: has other characters than letters, digits, - and _")
    if options.working_dir:
        check_size(parser, options.working_dir)
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        parser.error(f"--env: not set here: {', '.join(missing)}")
    host = urlsplit(options.address)
    if host.scheme not in ("http", "https"):
        parser.error(f"--address {options.address}: name the dashboard, such as http://127.0.0.1:8265")
    if host.scheme == "http" and host.hostname not in ("127.0.0.1", "localhost", "::1"):
        print(f"submit: {options.address} is not encrypted, and the token travels over it", file=sys.stderr)
    command = list(options.command)
    if command[:1] == ["train"] and not {"--resume", "--resume-or-start", "--dry-run"} & set(command):
        command.append("--resume-or-start")
    options.entrypoint = shlex.join(["exec", "ray-dfml", *command])
    return options


def check_size(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Refuse a working directory that is none, or that is too large, and name its largest file."""
    if not folder.is_dir():
        parser.error(f"--working-dir {folder}: is no folder")
    files = [(path.stat().st_size, path) for path in folder.rglob("*") if path.is_file()]
    if sum(size for size, _ in files) > MOST_BYTES:
        size, path = max(files)
        parser.error(
            f"--working-dir {folder}: over {MOST_BYTES >> 20} MiB, the largest is {path} with {size >> 20} MiB; put "
            "pools and data on storage that every node reaches"
        )


def start(client: JobSubmissionClient, options: argparse.Namespace) -> None:
    """Submit the job, unless it runs already. A job that has ended is removed first, since its id would be taken."""
    known = find(client, options.id)
    if known and not known.status.is_terminal():
        print(f"submit: {options.id} runs already", file=sys.stderr)
        return
    if known:
        client.delete_job(options.id)
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_SECONDS)} | {name: os.environ[name] for name in options.env}
    environment = {"env_vars": variables}
    if options.working_dir:
        environment["working_dir"] = str(options.working_dir)
    client.submit_job(entrypoint=options.entrypoint, submission_id=options.id, runtime_env=environment)


def find(client: JobSubmissionClient, id: str) -> JobDetails | None:
    """The job of a submission id, or None."""
    return next((job for job in client.list_jobs() if job.submission_id == id), None)


def follow(client: JobSubmissionClient, id: str) -> int:
    """Print the job's output until it ends. Returns its exit code."""

    async def show() -> None:
        async for lines in client.tail_job_logs(id):
            print(lines, end="", flush=True)

    asyncio.run(show())
    job = client.get_job_info(id)
    while not job.status.is_terminal():  # the output ends a moment before the job does
        asyncio.run(asyncio.sleep(0.5))
        job = client.get_job_info(id)
    print(f"submit: {id} {job.status.value.lower()}", file=sys.stderr)
    if job.status == JobStatus.STOPPED:
        return STOPPED
    code = job.driver_exit_code
    return LOST if code is None or code < 0 else code  # below 0 a signal ended it, as when memory is short


if __name__ == "__main__":
    sys.exit(main())
