"""Where a training rank and its vLLM engine meet for new weights: a socket in the run's own temporary folder.

verl 0.9.1 names it by Ray's job number alone, in /tmp, and every Ray cluster counts its jobs from 1. So of two runs on
one machine each removed the other's socket, and waited for ever, or got the other's weights.
"""

import os
from typing import Any

from verl.workers.rollout.vllm_rollout import ServerAdapter


def own(handle: str) -> str:
    """verl's address of the socket, with the run's folder (run/supervise.py sets TMPDIR) in place of /tmp."""
    return handle.replace("ipc:///tmp/", f"ipc://{os.environ.get('TMPDIR', '/tmp')}/")


class CPUServerAdapter(ServerAdapter):
    """verl's sender of weights."""

    zmq_handle: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zmq_handle = own(self.zmq_handle)
