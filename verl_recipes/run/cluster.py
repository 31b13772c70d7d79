"""An existing Ray cluster: whether this process runs in one of its jobs, and whether it has enough nodes.

python -m verl_recipes.run.cluster ADDRESS NODES GPUS_PER_NODE    waits for them, at most half a minute
"""

import os
import socket
import sys
import time
from typing import Any

from omegaconf import DictConfig

from data_prep.cli import UserError
from verl_recipes.settings.configuration import gpus_of

PATIENCE = 30  # seconds that nodes may take to join
RETURN = 600  # seconds that a lost node may take to come back: a machine starts in minutes
# Keys of ray.init that Ray refuses if the cluster exists.
OF_A_NEW_CLUSTER = ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard")


def in_job() -> bool:
    """Whether Ray's job submission started this process (ray/dashboard/modules/job/job_supervisor.py)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def missing_nodes(nodes: list[dict[str, Any]], wanted: int, gpus: int, in_all: int) -> str:
    """What a cluster lacks, as a sentence; "" for nothing.

    Args:
        nodes: as from `ray.nodes()`.
        wanted: how many nodes must hold `gpus` GPUs each.
        in_all: GPUs of the whole cluster that are needed.
    """
    held = sorted((int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]), reverse=True)
    if sum(each >= gpus for each in held) >= wanted and sum(held) >= in_all:
        return ""
    return f"{wanted} nodes of {gpus} GPUs ({in_all} in all) are needed, and the Ray cluster has nodes of {held} GPUs"


def node_answers(node: dict[str, Any]) -> bool:
    """Whether a node of `ray.nodes()` answers. Ray calls a dead node alive for another half minute."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=3).close()
    except OSError:
        return False
    return True


def other_run(actors: list[dict[str, str]]) -> str:
    """A sentence if another run is in the cluster, else "". verl's queue has one name, so two runs would share it.

    Args:
        actors: as from `ray.util.list_named_actors(all_namespaces=True)`.
    """
    if all(actor["namespace"] != "transfer_queue" for actor in actors):
        return ""
    return "another run is on the Ray cluster, and both would share verl's TransferQueue"


def await_nodes(address: str, wanted: int, gpus: int, in_all: int, patience: float = PATIENCE) -> None:
    """Wait until the cluster has the nodes and no other run; UserError after `patience` seconds."""
    import ray

    deadline, said = time.monotonic() + patience, ""
    while True:
        try:
            if not ray.is_initialized():
                ray.init(address=address, logging_level="error", log_to_driver=False)
            nodes = [node for node in ray.nodes() if node["Alive"] and node_answers(node)]
            actors = ray.util.list_named_actors(all_namespaces=True)
            lack = missing_nodes(nodes, wanted, gpus, in_all) or other_run(actors)
        except ConnectionError as error:
            lack = str(error).splitlines()[0]
        if not lack or time.monotonic() > deadline:
            break
        if lack != said:
            print(f"{lack}; waiting at most {patience} s", flush=True)
            said = lack
        time.sleep(1)
    ray.shutdown()
    if lack:
        raise UserError(f"{lack}; waited {patience} s. `ray status` shows what joined")


def check_nodes(cfg: DictConfig, patience: float = PATIENCE) -> None:
    """In a job: `await_nodes` for those that the run needs."""
    wanted, each = cfg.trainer.nnodes, cfg.trainer.n_gpus_per_node
    await_nodes(os.environ["RAY_ADDRESS"], wanted, each, sum(gpus_of(cfg)), patience)


def join_cluster(config: dict[str, Any], environment: dict[str, str]) -> None:
    """Change a run's configuration so that verl joins the job's cluster instead of starting one.

    The environment goes into the configuration because Ray's workers do not inherit that of this process.
    """
    init = config["ray_kwargs"]["ray_init"]
    for key in OF_A_NEW_CLUSTER:
        init.pop(key, None)
    init.setdefault("runtime_env", {}).setdefault("env_vars", {}).update(environment)


if __name__ == "__main__":
    address, nodes, gpus = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    await_nodes(address, nodes, gpus, nodes * gpus)
    print(f"{nodes} nodes of {gpus} GPUs are in the Ray cluster at {address}")
