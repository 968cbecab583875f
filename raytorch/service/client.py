"""Sending jobs to a cluster and following them, through Ray's Jobs API. Imports ray when it connects."""

import codecs
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import quote

import raytorch
from raytorch.config import RunConfig
from raytorch.config.file import dump_config, load_config
from raytorch.config.project import JOB_MARK
from raytorch.errors import JobError, Remedy, RunExistsError, RunNotFoundError, UserError
from raytorch.runs.catalog import SUMMARY_FILE
from raytorch.runs.plan import RunPlan, checked_name, more_to_do, plan_resume, timed_name
from raytorch.runs.storage import BASE, RunFolder, join, locate, split
from raytorch.service import secrets
from raytorch.service.dashboard import DashboardConnection
from raytorch.service.destination import Destination, EntrypointResources
from raytorch.service.job import DIGEST, KIND, RUN, Job, JobKind, describe, failure_of, started_at, summary_of
from raytorch.service.logs import BLOCK, JobLog, behind, states, whole
from raytorch.service.packages import mark, pack
from raytorch.service.projects import Project, collect_files, is_text, shown
from raytorch.system.temporary_folders import temporary_folder

CONFIG_NAME = "raytorch-run.yaml"
STOP_WAIT_S = 120
"""Seconds between asking a driver to end and killing it: the workers save a last checkpoint in them."""

logger = logging.getLogger("raytorch")


class Client:
    """A cluster that jobs are sent to.

    Example:
        >>> client = Client("http://127.0.0.1:8265")
        >>> job = client.submit("configs/quickstart.yaml")
        >>> print(client.wait(job.id).state, client.result(job.id)["metrics"])

    Args:
        address: URL of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
            http://127.0.0.1:8265. The token is taken from Ray's usual places.

    Raises:
        ClusterError: No cluster answers there within seconds, or it refuses the token.
    """

    def __init__(self, address: str | None = None) -> None:
        self._connection = DashboardConnection(address)
        self.address = self._connection.url

    def submit(self, config: RunConfig | str | Path, *, name: str | None = None, env: Iterable[str] = ()) -> Job:
        """Send a training run.

        Args:
            config: The run, or its YAML file.
            name: Name of the run, its folder and the job; by default the configuration's and the time.
            env: Names of environment variables whose values the job gets, in secret.

        Raises:
            ConfigError: The configuration is invalid.
            ResourceError: The cluster can never hold the workers. One that has lost a node is not judged.
            RunExistsError: There is a run or a job of that name.
            UserError: A path is relative where the cluster runs elsewhere, or a variable is not set.
        """
        config = config if isinstance(config, RunConfig) else load_config(config)
        name = _named(name, config.name)
        return self._submit_run(Destination(self._connection), config, name, env)

    def resume(
        self, run: str, config: RunConfig | None = None, *, changed_code: bool = False, env: Iterable[str] = ()
    ) -> Job:
        """Send an earlier run to be continued from its latest checkpoint; see :func:`raytorch.runs.plan.plan_resume`.

        Args:
            run: The run's name or path; its folder has to be readable from here.
            config: A changed configuration (more epochs, other workers); by default the run's own.
            changed_code: Whether it may go on with code of your own that has changed since its latest checkpoint.
            env: As for :meth:`submit`.

        Raises:
            UserError: The run has finished, and nothing is left to do; or as for :meth:`submit`.
        """
        there = Destination(self._connection)
        there.require_reached(run if config is None or "/" in run else config.storage, "run")
        plan = plan_resume(run, config, changed_code=changed_code)
        if plan.finished is not None:
            raise UserError(
                f"{plan.folder} has finished and nothing is left to do; to go on, give {more_to_do(plan.finished)}; "
                f"what it came to is in {plan.folder.file(SUMMARY_FILE)}"
            )
        return self._submit_run(there, plan.config, plan.config.name, env, resumed=plan)

    def submit_script(
        self,
        script: str | Path,
        arguments: Sequence[str] = (),
        *,
        name: str | None = None,
        storage: str = "runs",
        env: Iterable[str] = (),
        resources: EntrypointResources | None = None,
    ) -> Job:
        """Send a Python script, with the files of the project that it belongs to.

        The project is the current folder if the script lies in it, else the script's folder.

        Args:
            script: The script; it runs on the cluster's head, in the project's folder.
            arguments: What stands behind it on the command line.
            name: Name of the job and of its record's folder; by default the script's and the time.
            storage: Folder or URI where the record is kept: output, exit status, the last traceback. A relative storage
                in the script is taken in it; see :func:`raytorch.runs.storage.locate`.
            env: As for :meth:`submit`.
            resources: What the script's own process reserves.

        Raises:
            PackageError: The project is too large to send.
            ResourceError: No node could hold what the script reserves.
            RunExistsError, UserError: As for :meth:`submit`.
        """
        path = Path(script)
        if not path.is_file():
            raise UserError(f"{script}: no such file")
        path = path.parent.resolve() / path.name
        root = Path.cwd() if path.is_relative_to(Path.cwd()) else path.parent
        inside = path.relative_to(root)
        name = _named(name, re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "script")
        there = Destination(self._connection)
        there.require_reached(storage, "storage")
        run = join(locate(storage), name)
        resources = resources or EntrypointResources()
        there.require_node(resources)
        # Python takes what begins with a hyphen for an option.
        called = f"./{inside}" if str(inside).startswith("-") else str(inside)
        command = shlex.join(["python", "-m", "raytorch.service.script", run, "--", called, *arguments])

        def fill(archive: Path) -> str:
            _pack_project(collect_files(root, inside), archive)
            return sha256(archive.read_bytes()).hexdigest()

        return self._send(name, "script", run, command, fill, env, resources)

    def _submit_run(
        self, there: Destination, config: RunConfig, name: str, env: Iterable[str], resumed: RunPlan | None = None
    ) -> Job:
        digest = sha256(dump_config(config).encode()).hexdigest()
        config = there.config(config)
        there.require_room(config)
        run = join(config.storage, name)
        if resumed is None and "://" not in run and RunFolder(config.storage, name).exists():
            raise RunExistsError(
                f"{run} exists already; take another name, or resume it",
                remedies=[Remedy("name"), Remedy("resume", run, "job")],
            )

        def fill(archive: Path) -> str:
            folder = archive.parent / "run"
            project = collect_files(Path(config.code.root)) if config.code else Project(folder)
            own = {JOB_MARK: "", **config.code.sources} if config.code else {}
            for file, text in {CONFIG_NAME: dump_config(config), **own}.items():
                project.files[Path(file)] = folder / file
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(text, encoding="utf-8", newline="")
            _pack_project(project, archive)
            return digest

        job_id, how = name, f"--name {name}"
        if resumed:
            job_id, how = _named(None, name), f"--resume {shlex.quote(resumed.folder.address)}"
            how += " --changed-code" if resumed.changed_code else ""
        command = f"python -m raytorch train {CONFIG_NAME} {how}"
        return self._send(job_id, "train", run, command, fill, env, EntrypointResources())

    def _send(
        self,
        job_id: str,
        kind: JobKind,
        run: str,
        command: str,
        fill: Callable[[Path], str],
        env: Iterable[str],
        resources: EntrypointResources,
    ) -> Job:
        """Pack what the job needs, and submit it. ``fill`` writes the archive of its files and returns a digest."""
        for part in [run, *shlex.split(command)]:
            if not is_text(part):
                raise UserError(f"{shown(part)} is no UTF-8, so that no job can be given it; take another name")
        values = secrets.collect_secrets(env)
        with temporary_folder() as staging:
            archive = staging / "project.zip"
            digest = fill(archive)
            mark(archive, job_id)
            environment = _runtime_environment(run, values, staging)
            with self._connection.explaining():
                environment["working_dir"] = self._connection.send(archive)
                try:
                    self._connection.jobs.submit_job(
                        entrypoint=command,
                        submission_id=job_id,
                        runtime_env=environment,
                        metadata={"job_name": split(run)[1], KIND: kind, RUN: run, DIGEST: digest},
                        # Nothing by default: Ray then keeps drivers on the head, and as many as come at once do not
                        # hold the CPUs that their own workers wait for.
                        entrypoint_num_cpus=resources.cpus or None,
                        entrypoint_num_gpus=resources.gpus or None,
                        entrypoint_memory=resources.memory or None,
                    )
                except RuntimeError as error:
                    if "already exists" not in str(error):
                        raise
                    raise RunExistsError(
                        f"{self.address} has a job {job_id} already; take another name", remedies=[Remedy("name")]
                    ) from None
        return self.status(job_id)

    def jobs(self) -> list[Job]:
        """All jobs that were submitted to the cluster, oldest first."""
        with self._connection.explaining():
            listed = self._connection.jobs.list_jobs()
        found = [describe(details, self.address) for details in listed if details.type == "SUBMISSION"]
        return sorted(found, key=lambda job: job.submitted or datetime.min.astimezone())

    def status(self, job_id: str) -> Job:
        """A job as it stands, and why it failed if it did.

        Raises:
            JobNotFoundError: The cluster has no such job.
        """
        details = self._details(job_id)
        job = describe(details, self.address)
        summary = summary_of(job)
        unexplained = job.state == "failed" and not (summary or {}).get("error")
        log = JobLog(self._connection, job_id).tail(details) if unexplained else ""
        return replace(job, started=started_at(summary), failure=failure_of(job, details, summary, log))

    def logs(self, job_id: str, *, rank: int | None = None) -> str:
        """Read what a job's driver, or the worker of one rank, has written so far.

        Raises:
            JobNotFoundError: The cluster has no such job.
            RunNotFoundError: The rank's log is not there, or its storage cannot be read from here.
        """
        details = self._details(job_id)
        if rank is not None:
            return whole(_read_rank(describe(details, self.address), rank), f"rank {rank} of {job_id}")
        return JobLog(self._connection, job_id).read(details)

    def follow(self, job_id: str, *, rank: int | None = None) -> Iterator[str]:
        """Yield what a job's driver, or the worker of one rank, writes, until the job ends; see :meth:`logs`.

        While a rank's log is not there, or its storage cannot be read from here, a warning is logged that says so.
        """
        job = self._job(job_id)
        if rank is None:
            blocks = JobLog(self._connection, job_id).follow(states(self._details, job_id))
        else:
            _require_ranks(job)
            blocks = self._follow_rank(job_id, rank)
        return codecs.iterdecode(blocks, "utf-8", "replace")

    def wait(self, job_id: str) -> Job:
        """Wait until a job has ended."""
        self._job(job_id)
        for _ in states(self._details, job_id):
            pass
        return self.status(job_id)

    def stop(self, job_id: str) -> bool:
        """Ask a job to end, a training run with a last checkpoint; answers whether it was still going on."""
        if self._job(job_id).has_ended:
            return False
        with self._connection.explaining(job_id):
            return bool(self._connection.jobs.stop_job(quote(job_id, safe="")))

    def result(self, job_id: str) -> dict[str, Any]:
        """Read what a job came to: the ``summary.json`` in its run's folder.

        Raises:
            JobNotFoundError: The cluster has no such job.
            UserError: It has not ended, or its storage cannot be read from here.
            JobError: It failed before it wrote any.
        """
        job = self._job(job_id)
        if not job.has_ended:
            raise UserError(f"job {job_id} is {job.state}; follow it to its end", remedies=[Remedy("follow", job_id)])
        summary = summary_of(job)
        if summary is not None:
            return summary
        failure = self.status(job_id).failure
        if failure is not None:
            raise JobError(f"job {job_id} {job.state} and left no result here: {failure.traceback or failure.message}")
        raise UserError(f"{job.run} cannot be read from here, or a later job has gone on with the run")

    def _details(self, job_id: str) -> Any:
        with self._connection.explaining(job_id):
            return self._connection.jobs.get_job_info(quote(job_id, safe=""))

    def _job(self, job_id: str) -> Job:
        return describe(self._details(job_id), self.address)

    def _follow_rank(self, job_id: str, rank: int) -> Iterator[bytes]:
        told, warned = 0, False
        for details in states(self._details, job_id):
            job = describe(details, self.address)
            try:
                for block in behind(_read_rank(job, rank), told):
                    told += len(block)
                    yield block
            except UserError as reason:  # the worker has not started, or never will be seen from here
                if job.has_ended:
                    raise
                if not warned:
                    logger.warning("waiting for the log of rank %d: %s", rank, reason)
                warned = True


def _runtime_environment(run: str, values: Mapping[str, str], staging: Path) -> dict[str, Any]:
    [package] = raytorch.__path__
    environment: dict[str, Any] = {
        "py_modules": [package],
        "excludes": ["__pycache__"],
        # The job's own folder, where it runs, ends with the cluster.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), BASE: split(run)[0]},
    }
    if values:
        environment["py_modules"].append(str(secrets.write_secrets(values, staging)))
        environment["worker_process_setup_hook"] = secrets.HOOK
        environment["env_vars"][secrets.MARK] = "1"
    return environment


def _pack_project(project: Project, archive: Path) -> None:
    """Write a project's files into the archive of a job, and warn of what is left out."""
    gone = pack(project.root, project.files, archive)
    project.left_out.extend(f"{shown(file)} (gone meanwhile)" for file in gone)
    if told := project.told():
        logger.warning(told)


def _require_ranks(job: Job) -> RunFolder:
    """The folder of a training run. Raises RunNotFoundError for what is none."""
    if job.folder is None or job.kind != "train":
        raise RunNotFoundError(f"job {job.id} is no training run: its ranks have no logs of their own")
    return job.folder


def _read_rank(job: Job, rank: int) -> Iterator[bytes]:
    folder = _require_ranks(job)
    if not folder.exists(SUMMARY_FILE):
        raise RunNotFoundError(
            f"{folder} cannot be read from here, or the run has not begun; without a rank the driver's log is shown"
        )
    with folder.open(f"logs/rank-{rank}.log") as log:
        while block := log.read(BLOCK):
            yield block


def _named(name: str | None, otherwise: str) -> str:
    """``name``, if a run can have it; where none is given, ``otherwise`` with the time and something random."""
    return checked_name(name) if name is not None else timed_name(otherwise, f"-{token_hex(3)}")
