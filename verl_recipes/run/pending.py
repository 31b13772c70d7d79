"""What a Ray cluster has no room for: python -m verl_recipes.run.pending ADDRESS prints it in one line.

verl 0.9.1 waits without end for a placement group (its ranks) or an actor that no node can hold. Ray's own warning is
one line among thousands, and it says neither what the cluster has nor what to do.
"""

import sys
from collections.abc import Iterable, Mapping

Resources = Mapping[str, float]
SHOWN = ("CPU", "GPU")
RANK = (2, 3, 10)  # CPUs that verl asks for with a GPU; other programs of a cluster wait for other amounts


def amounts(resources: Resources) -> str:
    """The CPUs and GPUs among resources, as text.

    >>> amounts({"GPU": 1.0, "CPU": 3.0, "memory": 7e9})
    '3 CPU, 1 GPU'
    """
    return ", ".join(f"{resources[name]:g} {name}" for name in SHOWN if resources.get(name)) or "no CPU and no GPU"


def of_verl(wanted: Iterable[Resources]) -> list[Resources]:
    """Those that verl may have asked for: CPUs alone, or a GPU with the CPUs of a rank."""
    return [each for each in wanted if not each.get("GPU") or (each["GPU"] == 1 and each.get("CPU") in RANK)]


def sentence(wanted: Iterable[Resources], total: Resources, free: Resources) -> str:
    """What is pending in a cluster that has `total`, of which `free` is left; "" if nothing is.

    >>> sentence([{"CPU": 3, "GPU": 1}], {"CPU": 12, "GPU": 1}, {"CPU": 2, "GPU": 1})
    'Ray has no room for 3 CPU, 1 GPU: it has 12 CPU, 1 GPU, of which 2 CPU, 1 GPU are free'
    >>> sentence([], {"CPU": 12}, {"CPU": 2})
    ''
    """
    asked = list(dict.fromkeys(amounts(each) for each in wanted))
    if not asked:
        return ""
    return f"Ray has no room for {' and '.join(asked)}: it has {amounts(total)}, of which {amounts(free)} are free"


def pending(address: str) -> str:
    """The sentence for the cluster whose GCS is at HOST:PORT."""
    from ray.autoscaler.v2.sdk import get_cluster_status  # what `ray status` shows

    status = get_cluster_status(address)
    demands = status.resource_demands
    wanted = [
        each.bundle
        for demand in [*demands.placement_group_demand, *demands.ray_task_actor_demand]
        for each in demand.bundles_by_count
    ]
    return sentence(of_verl(wanted), status.total_resources(), status.available_resources())


if __name__ == "__main__":
    print(pending(sys.argv[1]))
