"""A Ray cluster of two nodes on this machine, each in a network namespace of its own where the machine allows that."""

import os
import shlex
import shutil
import subprocess
import sys
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.cli import CONFIGS

ROOT = CONFIGS.parent
TWO_NODES = ["nodes=2", "gpus=1"]  # overrides of a run over both


class Cluster:
    """Two nodes of one logical GPU each; commands run on the first."""

    def __init__(self):
        self.token = uuid.uuid4().hex
        self.folder = Path(f"/tmp/cz-{self.token[:8]}")  # Ray's sockets need a short one
        self.names = [f"cz{self.token[:6]}{i}" for i in (1, 2)]
        self.ips = ["10.77.0.1", "10.77.0.2"]
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "VERL_PLATFORM": "cpu",
            "HF_HUB_OFFLINE": "1",
            "SETUP": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_ADDRESS": "10.9.9.9:6379",  # from elsewhere; nobody may follow it
        }
        self.apart = all(subprocess.run(shlex.split(c), capture_output=True).returncode == 0 for c in self.network())
        if self.apart:
            self.environment["GLOO_SOCKET_IFNAME"] = "eth0"
        else:
            self.ips = ["127.0.0.1", "127.0.0.1"]

    def network(self):
        a, b = self.names
        yield from (f"ip netns add {a}", f"ip netns add {b}")
        yield f"ip link add eth0 netns {a} type veth peer name eth0 netns {b}"
        for name, ip in zip(self.names, self.ips, strict=True):
            yield f"ip -n {name} addr add {ip}/24 dev eth0"
            yield from (f"ip -n {name} link set {device} up" for device in ("eth0", "lo"))

    def on(self, node, *command):
        return [*(["ip", "netns", "exec", self.names[node]] if self.apart else []), *command]

    def run(self, *command, timeout=600, node=0):
        environment = self.environment | {"COUNTDOWN_ZERO_NODE": f"{self.token}{node}"}  # by which `kill` finds it
        return subprocess.run(
            self.on(node, *command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )

    def submission(self, *arguments):
        return ["bash", "launch/ray_submit.sh", f"http://{self.ips[0]}:8265", *arguments]

    def submit(self, *arguments):
        return self.run(*self.submission(*arguments))

    def start_both(self):
        for node in (0, 1):
            self.start(node)

    def start(self, node):
        # A folder for each: a node that unpacks a job's files first deletes those that are there, and a process whose
        # working folder is gone cannot load torch ("oneMKL FATAL ERROR: Cannot load libtorch_cpu.so").
        common = ["--num-gpus=1", "--num-cpus=16", "--object-store-memory=500000000", "--disable-usage-stats"]
        common += [f"--node-ip-address={self.ips[node]}", f"--temp-dir={self.folder}/{node}"]
        head, worker = ["--head", "--port=6379", "--dashboard-host=0.0.0.0"], [f"--address={self.ips[0]}:6379"]
        result = self.run("ray", "start", *(worker if node else head), *common, node=node)
        assert result.returncode == 0, result.stdout + result.stderr

    def kill(self, variable):
        """`kill -9` of every process with this in its environment."""
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if variable.encode() in (path / "environ").read_bytes():
                    os.kill(int(path.name), 9)

    def link(self, state):
        """The network between the nodes: "up", or "down", where nobody is told."""
        subprocess.run(["ip", "-n", self.names[1], "link", "set", "eth0", state], check=True)

    def kill_node(self, node):
        self.kill(f"COUNTDOWN_ZERO_NODE={self.token}{node}")

    def stop(self):
        self.kill(f"RAY_AUTH_TOKEN={self.token}")
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def running():
    """The cluster, until the end of the block."""
    cluster = Cluster()
    try:
        cluster.start_both()
        yield cluster
    finally:
        cluster.stop()
