"""Work of one process, run where the cluster has the CPUs and GPUs for it: a driver's own node may have none."""

import os
from collections.abc import Callable
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raygrec.train.settings import ClusterConfig

T = TypeVar("T")


class TaskLostError(RuntimeError):
    """A task whose process or node went away more often than `max_failures` allows."""


def as_task(cluster: ClusterConfig, function: Callable[..., T], *arguments: object) -> T:
    """Runs `function` as one Ray task with what one training worker has, and returns what it returns.

    A task that loses its node is started again, `max_failures` times at most. Raises what `function` raises, and
    `TaskLostError`.
    """
    resources = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)  # not inside the caller's, as a trial's would
    task = ray.remote(**resources, max_retries=cluster.max_failures, scheduling_strategy=anywhere)(function)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise TaskLostError(f"{function.__name__}: its process or node was lost ({reason})") from None


def where_there_is_room(cluster: ClusterConfig, function: Callable[..., T], *arguments: object) -> T:
    """`function` here, or `as_task` on a cluster that has, or may grow to, several nodes: a driver sits on its head,
    which may have no CPU to spare."""
    several = sum(node["Alive"] for node in ray.nodes()) > 1
    if several or os.environ.get("RAYGREC_AUTOSCALING") == "1":
        return as_task(cluster, function, *arguments)
    return function(*arguments)
