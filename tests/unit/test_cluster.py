"""What a Ray that was joined can never hold is refused, unless an autoscaler could add nodes. No Ray runs here."""

import os
import signal
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated.common_pb2 import NodeDeathInfo
from ray.job_config import JobConfig
from whole_runs import plan

from raytorch.cluster import token
from raytorch.cluster.capacity import AUTOSCALER_LABEL, require_resources, scales_itself
from raytorch.cluster.joining import has_own_ray, joined_ray, leave_ray, starts_ray
from raytorch.config import RunConfig, SweepConfig
from raytorch.errors import ClusterError, ResourceError, UserError
from raytorch.runs.plan import RunPlan
from raytorch.scaling import study as scaling
from raytorch.sweeps import sweep
from raytorch.sweeps.file import Sweep, Trial
from raytorch.system.processes import Process, set_handlers
from raytorch.system.temporary_folders import delete_abandoned
from raytorch.training import driver

ONE_CPU = {"CPU": 1.0}


class Cluster:
    """A cluster that the process has joined."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []

    def add(self, resources: dict[str, float], group: str | None = None, death: int | None = None) -> None:
        """Add a node that is up, or one that died for the reason ``death``."""
        labels = {"ray.io/node-id": "ab"} | ({AUTOSCALER_LABEL: group} if group else {})
        state = {"Alive": death is None, "DeathReason": death or NodeDeathInfo.UNSPECIFIED}
        self.nodes.append({"NodeID": "a", "Resources": resources, "Labels": labels, **state})

    def resources(self) -> dict[str, float]:
        kinds = {kind for node in self.nodes for kind in node["Resources"]}
        return {kind: sum(node["Resources"].get(kind, 0) for node in self.nodes) for kind in kinds}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A head that no worker fits on, and a node with three CPUs."""
    cluster = Cluster()
    cluster.add({"CPU": 0.0})
    cluster.add({"CPU": 3.0})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: cluster.nodes)
    monkeypatch.setattr(ray, "cluster_resources", cluster.resources)
    return cluster


@pytest.fixture
def autoscaled(cluster: Cluster) -> Cluster:
    """A head that no worker fits on, whose autoscaler has ended all other nodes."""
    cluster.nodes.clear()
    cluster.add({"CPU": 0.0}, group="head")
    return cluster


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans of the runs that were let in; none of them trains."""
    plans: list[Any] = []
    monkeypatch.setattr(driver, "_supervise", lambda plan, *_: plans.append(plan) or {"state": "stopped"})
    monkeypatch.setattr(sweep, "_run_trials", lambda plan, *_: plans.append(plan) or {"state": "stopped"})
    return plans


def swept(run: dict[str, Any], *workers: int) -> Sweep:
    config = SweepConfig.model_validate({"run": run, "parameters": {"scaling.workers": {"grid": list(workers)}}})
    runs = [RunConfig.model_validate(run | {"scaling": {"workers": number}}) for number in workers]
    return Sweep(config, tuple(Trial(n, {}, run) for n, run in enumerate(runs)))


# -- the judgement -----------------------------------------------------------------------------------------------------


def test_a_cluster_scales_itself_if_an_autoscaler_has_started_a_node_that_is_up(cluster: Cluster) -> None:
    assert not scales_itself()
    cluster.add({}, group="workers", death=NodeDeathInfo.AUTOSCALER_DRAIN_IDLE)
    assert not scales_itself()
    cluster.add({"CPU": 1.0}, group="workers")
    assert scales_itself()


def test_nodes_that_are_up_count(cluster: Cluster) -> None:
    require_resources(3, ONE_CPU)
    cluster.add({"CPU": 9.0}, death=NodeDeathInfo.EXPECTED_TERMINATION)
    with pytest.raises(ResourceError, match=r"^4 workers with 1 CPU each need 4 CPUs, but the cluster has 3; lower "):
        require_resources(4, ONE_CPU)
    with pytest.raises(ResourceError, match=r"^2 workers with 1 GPU each need 2 GPUs, but .* has 0; lower "):
        require_resources(2, {"CPU": 1.5, "GPU": 1.0})
    cluster.add({"CPU": 1.0})
    with pytest.raises(
        ResourceError, match=r"^2 workers with 2 CPU each do not fit on the nodes, .* room for 1; lower "
    ):
        require_resources(2, {"CPU": 2.0})


def test_a_cluster_that_scales_itself_is_not_judged(autoscaled: Cluster) -> None:
    require_resources(100, {"CPU": 8.0, "GPU": 1.0})


@pytest.mark.parametrize("reason", ["UNEXPECTED_TERMINATION", "AUTOSCALER_DRAIN_PREEMPTED"])
def test_a_cluster_that_has_lost_a_node_is_not_judged(cluster: Cluster, reason: str) -> None:
    cluster.add({}, death=NodeDeathInfo.Reason.Value(reason))
    require_resources(4, ONE_CPU)


# -- which cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """The addresses that Ray was to join, and what it then saw as RAY_ADDRESS. No Ray is started, and none asked."""
    calls: list[tuple[str, str | None]] = []

    def init(address: str, **_: object) -> SimpleNamespace:
        calls.append((address, os.environ.get("RAY_ADDRESS")))
        return SimpleNamespace(address_info={"session_dir": str(tmp_path / "session")})

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(token, "mode_of", lambda address: None)
    return calls


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("starts", [True, False])
def test_what_a_process_had_set_is_there_again_after_ray(monkeypatch: pytest.MonkeyPatch, starts: bool) -> None:
    init = ray.init
    held: list[int] = []

    def init_as_ray_does(*arguments: Any, **options: Any) -> Any:
        signal.signal(signal.SIGTERM, lambda *_: None)
        held.extend(signal.pthread_sigmask(signal.SIG_BLOCK, []))  # in the processes that it starts, too
        if not starts:
            raise RuntimeError("no room")
        return init(*arguments, **options)

    def mine(*_: object) -> None: ...

    monkeypatch.setattr(ray, "init", init_as_ray_does)
    settings, before = dict(os.environ), set_handlers(dict.fromkeys((signal.SIGTERM, signal.SIGHUP), mine))
    try:
        with nullcontext() if starts else pytest.raises(ClusterError), joined_ray():
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # of the shell that ends with its terminal
            assert os.environ.keys() > settings.keys()
        assert {signal.getsignal(number) for number in before} == {mine}
        assert signal.SIGHUP in held
        assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        set_handlers(before)
    assert dict(os.environ) == settings


@pytest.mark.usefixtures("joined")
@pytest.mark.skipif(Process.current().boot is None, reason="this system does not tell its starts apart")
@pytest.mark.parametrize("address", [None, "auto"])
def test_a_ray_is_noted_for_who_comes_later_and_what_earlier_ones_have_left_goes(
    tmp_path: Path, address: str | None
) -> None:
    delete_abandoned.cache_clear()
    ours = tmp_path / f"raytorch-{os.getuid()}"
    left = ours / "1-1-00000000-0000-0000-0000-000000000000-1-0a1b2c3d"  # before the machine was started anew
    left.mkdir(parents=True)
    with joined_ray(address):
        noted = [path.readlink() for path in ours.iterdir() if path.is_symlink()]
    assert noted == ([] if address else [tmp_path / "session"])
    assert not left.exists()


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(("home", "needs_one"), [("", False), ("missing", True)])
def test_a_ray_that_is_started_here_has_a_token_where_the_home_can_keep_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str, needs_one: bool
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / home))
    with joined_ray():
        assert ("RAY_AUTH_TOKEN" in os.environ) is needs_one
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.usefixtures("joined")
def test_who_is_to_survive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with joined_ray():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("imports", [True, False])
def test_workers_import_from_the_current_folder_if_this_process_does(
    monkeypatch: pytest.MonkeyPatch, imports: bool
) -> None:
    init, given = ray.init, []

    def init_with(*arguments: Any, job_config: JobConfig, **options: Any) -> Any:
        given.append(job_config._client_job)  # Ray adds the current folder unless that is so
        return init(*arguments, **options)

    monkeypatch.setattr(ray, "init", init_with)
    others = [entry for entry in sys.path if Path(entry).absolute() != Path.cwd()]
    monkeypatch.setattr(sys, "path", ["", *others] if imports else others)
    with joined_ray():
        pass
    assert given == [not imports]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8265", "https://ray.example.com"])
def test_the_address_for_jobs_is_no_cluster_to_join(
    monkeypatch: pytest.MonkeyPatch, joined: list[tuple[str, str | None]], url: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", url)
    for address in (None, "auto", "10.0.0.1:6379"):
        with joined_ray(address):
            assert os.environ["RAY_ADDRESS"] == url  # for jobs that are sent from here
    assert joined == [("local", None), ("auto", None), ("10.0.0.1:6379", None)]
    assert starts_ray(None)


def test_other_addresses_in_the_environment_are_joined(
    monkeypatch: pytest.MonkeyPatch, joined: list[tuple[str, str | None]]
) -> None:
    for address in ("10.0.0.1:6379", "auto", "ray://head:10001"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert not starts_ray(None)
        with joined_ray():
            pass
    assert joined == [(address, address) for address in ("10.0.0.1:6379", "auto", "ray://head:10001")]


def test_a_ray_that_was_left_early_is_not_left_again(
    monkeypatch: pytest.MonkeyPatch, joined: list[tuple[str, str | None]]
) -> None:
    left: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: left.append(joined[-1][0]))
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(joined_ray())
        assert has_own_ray()
        leave_ray()
        leave_ray()
        assert not has_own_ray()
        second.enter_context(joined_ray("auto"))
        assert not has_own_ray()
        first.close()
        assert left == ["local"]  # what was joined since then is not the first one's to leave
    assert left == ["local", "auto"]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (None, "no Ray starts on this machine: timed out"),
        ("auto", "the cluster at auto cannot be joined: timed"),
    ],
)
def test_a_ray_that_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, joined: list[tuple[str, str | None]], address: str | None, told: str
) -> None:
    def init(address: str, **_: object) -> None:
        raise Exception("timed out during startup")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match=f"^{told}"), joined_ray(address):
        pass


def test_a_dashboard_that_is_to_be_joined_is_refused(joined: list[tuple[str, str | None]]) -> None:
    with pytest.raises(UserError) as refusal, joined_ray("http://head:8265"):
        pass
    assert str(refusal.value) == (
        "http://head:8265 is the URL of a dashboard, where jobs are submitted; to join a cluster from here, give "
        "HOST:6379 or auto"
    )
    assert not joined


# -- who asks ----------------------------------------------------------------------------------------------------------


def test_a_run_that_can_never_start_is_refused_by_a_cluster_that_was_joined(
    cluster: Cluster, started: list[Any], small_run: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=r"cluster has 3; lower scaling.workers or scaling.cpus_per_worker, or add"):
        driver.run_training(plan(small_run, "wide", scaling={"workers": 4}))
    assert not (tmp_path / "runs").exists()
    assert not started


def test_a_run_is_let_in_if_it_fits_and_an_elastic_one_if_its_fewest_workers_do(
    cluster: Cluster, started: list[Any], small_run: dict[str, Any]
) -> None:
    for workers in (3, {"min": 3, "max": 50}):
        driver.run_training(plan(small_run, "fits", scaling={"workers": workers}))
    assert len(started) == 2
    with pytest.raises(ResourceError, match=r"^4 workers "):
        driver.run_training(plan(small_run, "wide", scaling={"workers": {"min": 4, "max": 50}}))


def test_a_run_waits_for_nodes_that_an_autoscaler_adds(
    autoscaled: Cluster, started: list[Any], small_run: dict[str, Any]
) -> None:
    driver.run_training(plan(small_run, "wide", scaling={"workers": 4}))
    assert len(started) == 1


def test_a_study_is_judged_by_its_largest_size(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, small_config: Path
) -> None:
    plans: list[RunPlan] = []
    monkeypatch.setattr(scaling, "run_training", lambda plan, **_: plans.append(plan) or {"state": "stopped"})
    study = scaling.plan_study(small_config, [1, 4])
    with pytest.raises(ResourceError, match=r"^4 workers .* lower workers or scaling.cpus_per_worker, or add nodes$"):
        scaling.run_study(study)
    assert not plans
    cluster.add({"CPU": 0.0}, group="head")
    with pytest.raises(KeyboardInterrupt):
        scaling.run_study(study)
    assert plans == [study.plans[0]]


def test_a_sweep_is_judged_by_each_of_its_trials(
    cluster: Cluster, started: list[Any], small_run: dict[str, Any]
) -> None:
    with pytest.raises(ResourceError, match=r"^4 workers "):
        sweep.run_sweep(sweep.plan_sweep(swept(small_run, 1, 4)))
    assert not started
    cluster.add({"CPU": 0.0}, group="head")
    sweep.run_sweep(sweep.plan_sweep(swept(small_run, 1, 4)))
    assert len(started) == 1


def test_a_sweep_takes_as_many_trials_at_a_time_as_there_is_or_may_be_room_for(
    cluster: Cluster, small_run: dict[str, Any]
) -> None:
    def at_a_time(*workers: int) -> int:
        return sweep._concurrency([trial.config for trial in swept(small_run, *workers).trials])

    assert at_a_time(1, 1, 1, 1, 1) == 3
    assert at_a_time(1, 2, 1, 1, 1) == 1
    cluster.add({"CPU": 0.0}, group="head")
    assert at_a_time(1, 2, 1, 1, 1) == 5
