"""Ends a run one of whose actors died: verl 0.9.1 waits for some of them for ever.

Such are an agent loop that answers, a vLLM server before it asks for new weights, and TransferQueue's controller and
storage. A thread of the trainer's process asks Ray's table of actors, which holds those of every node.
"""

import os
import threading
import time

import ray

# `ray.util.state` has the same table, but asks the dashboard, which a run on one machine does without.
from ray._private.state import actors
from ray.core.generated.common_pb2 import ActorDiedErrorContext

LOOK = 2  # seconds between two looks
PATIENCE = 60  # seconds in which verl may end by itself, with an error that says more
BY_ITSELF = (ActorDiedErrorContext.WORKER_DIED, ActorDiedErrorContext.NODE_DIED)


def dead_actors() -> list[str]:
    """The classes of this job's actors whose process or node died; those that verl itself ended are none."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    dead = actors(job_id=job, actor_state_name="DEAD").values()
    causes = ((each["ActorClassName"], each["DeathCause"]) for each in dead)
    return [
        name
        for name, cause in causes
        if cause.HasField("oom_context") or cause.actor_died_error_context.reason in BY_ITSELF
    ]


def wait_for_a_death() -> None:
    """Return never: end this process PATIENCE seconds after the death of an actor."""
    while not (dead := dead_actors()):
        time.sleep(LOOK)
    time.sleep(PATIENCE)
    print(f"RuntimeError: {dead[0]} died, and verl would wait for it for ever", flush=True)
    time.sleep(LOOK)  # so that Ray brings this line to the log
    os._exit(1)


def watch() -> None:
    """Begin to look, for as long as this process lives. Another run of the cluster must not share TransferQueue."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    if all(each["ActorClassName"] != "TransferQueueController" for each in actors(job_id=job).values()):
        # A run that was submitted at the same time made it. After an exception verl would end that run's queue.
        print("RuntimeError: another run is on the Ray cluster, and verl's TransferQueue is for one", flush=True)
        time.sleep(LOOK)  # so that Ray brings this line to the log
        os._exit(1)
    threading.Thread(target=wait_for_a_death, name="dead actors", daemon=True).start()
