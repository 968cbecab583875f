"""How an elastic run changes its number of workers: Ray Train's own policy, which here loses no steps and no time.

Builds on an internal class of Ray Train, checked with Ray 2.60 and tested in ``tests/chaos/test_elastic.py``.
"""

import time
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from raytorch.runs.status import MonitorHandle

LOOK_ROUND_S = 1.0
"""Seconds between two looks at what room there is."""
ANSWER_WAIT_S = 5.0
EXPECTING_LOST_NODES = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
"""Has the controller of an elastic run wait 10 s for workers that it has room for, not 60.

It plans with a node that died until Ray notices that, some 15 s later, and does not plan anew while it waits.
"""


class SavingElasticPolicy(ElasticScalingPolicy):
    """Takes as many workers as there is room for, and has those that train save a checkpoint before it changes them.

    Runs in Ray Train's controller. A change is a planned restart, which ``failure.max_restarts`` does not count.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, monitor: MonitorHandle) -> None:
        super().__init__(scaling_config)
        self._monitor = monitor
        self._looked_at = float("-inf")
        self._group: float | None = None
        """When the group started that the following is about."""
        self._resize: ResizeDecision | None = None
        """The decision that is to follow the checkpoint that the workers have been asked for."""

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Called without a pause for as long as it decides to wait."""
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(LOOK_ROUND_S)
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Called after each poll of the workers."""
        if self._group != worker_group_state.start_time:
            self._group, self._resize = worker_group_state.start_time, None
        if self._resize is None:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if isinstance(decision, ResizeDecision):
                self._resize = decision
                self._monitor.request_save.remote()
            return NoopDecision()
        if not self._is_saved():
            return NoopDecision()
        self._monitor.resizing.remote()
        decision, self._resize = self._resize, None
        return decision

    def _is_saved(self) -> bool:
        answer = self._monitor.is_saved.remote()
        return bool(ray.wait([answer], timeout=ANSWER_WAIT_S)[0] and ray.get(answer))

    def _get_reserved_resources(self) -> Any:
        """As Ray's own, but of the nodes that there are now: its coordinator looks only every 20 s by itself. Ray
        2.55 has another name for this, and keeps to its own pace."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_ROUND_S:
            self._looked_at = now
            look = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            ray.wait([look], timeout=ANSWER_WAIT_S)
        return super()._get_reserved_resources()
