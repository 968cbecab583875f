"""Commands about jobs on a cluster: sending, listing, following and stopping them."""

import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.table import Table

from raytorch.cli import common
from raytorch.errors import UserError
from raytorch.system.terminal import cell, pass_on, say, say_labelled, say_table

app = common.new_app()

Address = Annotated[
    str | None,
    typer.Option(
        help="URL of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."
    ),
]
LONGEST_LINE = 64 * 1024**2
"""Characters after which a line of a log is broken, so that one without end does not fill the memory."""
JobId = Annotated[str, typer.Argument(help="A job, by its id.")]


@app.command()
def submit(
    target: Annotated[
        Path | None, typer.Argument(metavar="CONFIG|SCRIPT", help="YAML file of a run, or a Python script.")
    ] = None,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGS]", help="Arguments of the script.")] = None,
    overrides: common.Overrides = None,
    workers: common.Workers = None,
    name: common.Name = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run, by its name or path.")] = None,
    changed_code: common.ChangedCode = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Give the job an environment variable that is set here, in secret."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Folder or URI for the record of a script, whose relative storages are in it ('runs' in one "
            "that ends with runs is that itself); a configuration has its own."
        ),
    ] = None,
    entrypoint_cpus: Annotated[float, typer.Option(min=0, help="CPUs that the script itself computes on.")] = 0,
    entrypoint_gpus: Annotated[float, typer.Option(min=0, help="GPUs that the script itself computes on.")] = 0,
    entrypoint_memory: Annotated[int, typer.Option(min=0, help="Bytes of memory that the script itself needs.")] = 0,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the log to the job's end; exit status as the job.")
    ] = False,
    address: Address = None,
    as_json: common.AsJson = False,
) -> int:
    """Send a run or a script to a cluster."""
    from raytorch.service.destination import EntrypointResources
    from raytorch.sweeps.file import is_sweep

    if target is not None and target.suffix == ".py":
        _refuse("a script", {"--set": overrides, "--workers": workers, "--resume": resume})
        client = _client(address)
        resources = EntrypointResources(entrypoint_cpus, entrypoint_gpus, entrypoint_memory)
        job = client.submit_script(
            target, arguments or [], name=name, storage=storage or "runs", env=env or [], resources=resources
        )
    elif target is None and not resume:
        raise UserError("give a configuration file, a script, or --resume RUN")
    else:
        given = {"ARGS": arguments, "--storage": storage, "--entrypoint-cpus": entrypoint_cpus}
        _refuse("a run", given | {"--entrypoint-gpus": entrypoint_gpus, "--entrypoint-memory": entrypoint_memory})
        if target and is_sweep(target):
            raise UserError(
                f"{target} is a sweep: send a script that runs it: raytorch submit jobs/sweep.py -- {target}"
            )
        config = common.config_from_options(target, overrides, workers, name, resume)
        client = _client(address)
        if resume:
            # Without a file that says where, a run that is given by its name alone was found in runs.
            run = resume if target or "/" in resume else f"runs/{resume}"
            job = client.resume(run, config, changed_code=changed_code, env=env or [])
        else:
            job = client.submit(config, name=name, env=env or [])
    _show_submitted(job, address, as_json, wait)
    return _follow_to_the_end(client, job.id, as_json) if wait else 0


@app.command("jobs")
def list_jobs(address: Address = None, as_json: common.AsJson = False) -> None:
    """List the jobs of a cluster."""
    client = _client(address)
    found = client.jobs()
    if as_json:
        common.print_json([_record(job) for job in found])
        return
    table = Table("job", "kind", "state", "submitted", "seconds", box=None)
    for job in found:
        table.add_row(*map(cell, (job.id, job.kind, job.state, _local(job.submitted), _seconds(job))))
    if found:
        say_table(common.output, table)
    else:
        say(common.output, f"no jobs on {client.address}")


@app.command()
def status(job_id: JobId, address: Address = None, as_json: common.AsJson = False) -> None:
    """Show a job, and why it failed if it did."""
    job = _client(address).status(job_id)
    if as_json:
        common.print_json(_record(job))
    else:
        _show(job)


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="The log of one worker, in place of the driver's.")] = None,
    address: Address = None,
    as_json: common.AsJson = False,
) -> int:
    """Print what a job has written; with -f, exit status as the job."""
    client = _client(address)
    write = _write_lines if as_json else _write_text
    if follow:
        return _follow(client, job_id, rank, write)
    write([client.logs(job_id, rank=rank)])
    return 0


@app.command()
def stop(job_id: JobId, address: Address = None, as_json: common.AsJson = False) -> None:
    """Ask a job to end; a run saves a last checkpoint."""
    client = _client(address)
    stopping = client.stop(job_id)
    if as_json:
        common.print_json({"id": job_id, "stopping": stopping})
    elif stopping:
        say(common.output, f"stopping {job_id}; {_command('status', job_id, address)} tells when it has ended")
    else:
        say(common.output, f"{job_id} had ended already: {client.status(job_id).state}")


@app.command()
def result(job_id: JobId, address: Address = None, as_json: common.AsJson = False) -> int:
    """Print what a job came to. Exit status 1 if it failed."""
    from raytorch.cli.progress import print_summary

    client = _client(address)
    summary = client.result(job_id)
    if as_json:
        common.print_json(summary)
    elif summary["state"] in ("finished", "stopped") and "step" in summary:
        there = f" --address {shlex.quote(address)}" if address else ""
        print_summary(common.output, summary, resume=f"raytorch submit{there} --resume")
    else:
        _show(client.status(job_id))
    return _exit_status(summary["state"])


def _client(address: str | None) -> Any:
    from raytorch.service.client import Client

    return Client(address)


def _refuse(what: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise UserError(f"{', '.join(given)} {'does' if len(given) == 1 else 'do'} not go with {what}")


def _show_submitted(job: Any, address: str | None, as_json: bool, wait: bool) -> None:
    if as_json:
        if not wait:
            common.print_json(_record(job))
        return
    console = common.errors if wait else common.output  # with --wait, standard output is the job's log
    lines = [("job", job.id), ("dashboard", job.link), ("run", job.run)]
    calls = {"follow": "logs -f", "state": "status", "result": "result", "stop": "stop"}
    lines += [(what, _command(call, job.id, address)) for what, call in calls.items()]
    for label, text in lines:
        say_labelled(console, label, text, 11)


def _follow_to_the_end(client: Any, job_id: str, as_json: bool) -> int:
    status = _follow(client, job_id, None, partial(_write_text, file=sys.stderr if as_json else sys.stdout))
    if as_json:
        common.print_json(_record(client.status(job_id)))
    elif status:
        _show(client.status(job_id))
    return status


def _follow(client: Any, job_id: str, rank: int | None, write: Callable[[Iterable[str]], None]) -> int:
    """Write what a job writes until it has ended; answers its own exit status, if it has failed with one."""
    try:
        write(client.follow(job_id, rank=rank))
        job = client.wait(job_id)
    except KeyboardInterrupt:
        say(common.errors, f"{job_id} goes on; 'raytorch stop {job_id}' ends it")
        raise typer.Exit(common.EXIT_STOPPED) from None
    return (job.exit_status if job.state == "failed" else 0) or _exit_status(job.state)


def _exit_status(state: str) -> int:
    return {"finished": 0, "stopped": common.EXIT_STOPPED}.get(state, common.EXIT_FAILED)


def _show(job: Any) -> None:
    facts = [("job", job.id), ("name", job.name), ("kind", job.kind), ("state", job.state)]
    facts += [("submitted", _local(job.submitted)), ("started", _local(job.started)), ("ended", _local(job.ended))]
    facts += [("run", job.run or ""), ("digest", (job.digest or "")[:12]), ("dashboard", job.link)]
    if job.failure:
        rank = f"rank {job.failure.rank}: " if job.failure.rank is not None else ""
        facts += [("cause", job.failure.cause), ("message", f"{rank}{job.failure.message}")]
    for label, text in facts:
        if text:
            say(common.output, f"{label:<11}{text}")
    if job.failure and job.failure.traceback:
        say(common.output, f"\n{job.failure.traceback}")


def _command(call: str, job_id: str, address: str | None) -> str:
    return f"raytorch {call} {shlex.quote(job_id)}" + (f" --address {shlex.quote(address)}" if address else "")


def _write_text(log: Iterable[str], file: TextIO | None = None) -> None:
    """Write the pieces of a log as they come."""
    for piece in log:
        pass_on(piece, file or sys.stdout)


def _write_lines(log: Iterable[str]) -> None:
    """Write a log as JSON, an object for each line: a line ends with a newline and with nothing else."""
    begun: list[str] = []
    length = 0
    for part in (part for piece in log for part in StringIO(piece)):
        begun.append(part)
        length += len(part)
        if part.endswith("\n") or length > LONGEST_LINE:
            _write_line(begun)
            begun, length = [], 0
    if begun:
        _write_line(begun)


def _write_line(parts: Iterable[str]) -> None:
    common.print_json({"line": "".join(parts).removesuffix("\n").removesuffix("\r")})


def _record(job: Any) -> dict[str, Any]:
    return asdict(job) | {"link": job.link}


def _local(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else ""


def _seconds(job: Any) -> str:
    if job.submitted is None:
        return ""
    end = job.ended or datetime.now().astimezone()
    return f"{(end - job.submitted).total_seconds():.0f}"
