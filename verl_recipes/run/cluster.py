"""A Ray cluster that is there already: whether this process runs in a job of it, and whether its nodes are enough.

python -m verl_recipes.run.cluster ADDRESS NODES GPUS_PER_NODE    waits for them, half a minute at most
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
OF_A_NEW_CLUSTER = ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard")


def in_job() -> bool:
    """Whether Ray's job submission started this process (ray/dashboard/modules/job/job_supervisor.py)."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def missing(nodes: list[dict[str, Any]], wanted: int, gpus: int, in_all: int) -> str:
    """What a cluster lacks, as a sentence; "" for nothing.

    Args:
        nodes: as from `ray.nodes()`.
        wanted: how many nodes must hold `gpus` GPUs each.
        in_all: GPUs of the whole cluster that are needed.
    """
    held = sorted((int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]), reverse=True)
    if sum(each >= gpus for each in held) >= wanted and sum(held) >= in_all:
        return ""
    return f"{wanted} nodes of {gpus} GPUs ({in_all} in all) are wanted, and the Ray cluster has nodes of {held} GPUs"


def answers(node: dict[str, Any]) -> bool:
    """Whether a node of `ray.nodes()` is there: of one that died Ray says "Alive" for half a minute more."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=3).close()
    except OSError:
        return False
    return True


def occupied(actors: list[dict[str, str]]) -> str:
    """Another run in a cluster, as a sentence; "" for none. verl's queue has one name there: two runs would share it.

    Args:
        actors: as from `ray.util.list_named_actors(all_namespaces=True)`.
    """
    if all(actor["namespace"] != "transfer_queue" for actor in actors):
        return ""
    return "a run is on the Ray cluster still, and its queue (verl's TransferQueue) would be this run's too"


def await_nodes(address: str, wanted: int, gpus: int, in_all: int, patience: float = PATIENCE) -> None:
    """Return once the cluster has the nodes and no run; UserError if that takes longer than `patience` seconds."""
    import ray

    deadline, said = time.monotonic() + patience, ""
    while True:
        try:
            if not ray.is_initialized():
                ray.init(address=address, logging_level="error", log_to_driver=False)
            nodes = [node for node in ray.nodes() if node["Alive"] and answers(node)]
            actors = ray.util.list_named_actors(all_namespaces=True)
            lack = missing(nodes, wanted, gpus, in_all) or occupied(actors)
        except ConnectionError as error:
            lack = str(error).splitlines()[0]
        if not lack or time.monotonic() > deadline:
            break
        if lack != said:
            print(f"{lack}; waiting {patience} s at most", flush=True)
            said = lack
        time.sleep(1)
    ray.shutdown()
    if lack:
        raise UserError(f"{lack}; waited {patience} s. `ray status` shows what joined")


def check_nodes(cfg: DictConfig, patience: float = PATIENCE) -> None:
    """In a job: the run's nodes are there and free, or come within `patience` seconds."""
    wanted, each = cfg.trainer.nnodes, cfg.trainer.n_gpus_per_node
    await_nodes(os.environ["RAY_ADDRESS"], wanted, each, sum(gpus_of(cfg)), patience)


def join(config: dict[str, Any], environment: dict[str, str]) -> None:
    """Change a run's configuration so that verl joins the job's cluster instead of starting one.

    Ray refuses sizes of a cluster that exists, and its workers do not inherit this process's environment.
    """
    init = config["ray_kwargs"]["ray_init"]
    for key in OF_A_NEW_CLUSTER:
        init.pop(key, None)
    variables = init.setdefault("runtime_env", {}).setdefault("env_vars", {})
    variables |= environment


if __name__ == "__main__":
    address, nodes, gpus = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    await_nodes(address, nodes, gpus, nodes * gpus)
    print(f"{nodes} nodes of {gpus} GPUs are in the Ray cluster at {address}")
