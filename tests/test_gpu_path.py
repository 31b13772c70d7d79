"""What a run on GPUs does differently from one on a CPU, as far as no GPU is needed to see it."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time

import hydra
import pyarrow.parquet as pq
import pytest
from configurations import compose
from omegaconf import OmegaConf

from data_prep.cli import CONFIGS, UserError
from verl_recipes.run import pending, start, supervise
from verl_recipes.run.folder import RunFolder
from verl_recipes.run.preflight import check_prompt_lengths


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["h100", "a800_x8", "rtx4090_x2"])
def test_ray_has_the_logical_cpus_that_verl_waits_for_however_few_the_machine_has(hardware):
    """Three a GPU for verl's pools, one a storage unit and the controller of TransferQueue, and one for what starts."""
    cfg = compose("train", f"hardware={hardware}")
    units = cfg.transfer_queue.backend.SimpleStorage.num_data_storage_units
    assert cfg.ray_kwargs.ray_init.num_cpus == 3 * cfg.gpus + units + 9
    ranks = compose("train", f"hardware={hardware}", "trainer.n_gpus_per_node=8")  # verl's own key
    assert ranks.ray_kwargs.ray_init.num_cpus == 3 * 8 + units + 9
    assert cfg.transfer_queue.backend.SimpleStorage.required_node_resource == "GPU"


@pytest.mark.slow
def test_ray_itself_says_what_it_has_no_room_for():
    """A real cluster, a placement group that is too large, and the same question as of a run's own Ray."""
    code = (
        "import ray, sys\n"
        "from ray.util.placement_group import placement_group\n"
        "ray.init('local', num_cpus=2, include_dashboard=False)\n"
        "placement_group([{'CPU': 3}])\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Ray's sockets bear no longer path
        environment = os.environ | {"RAY_TMPDIR": folder}
        with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as cluster:
            deadline = time.monotonic() + 120
            while not (said := supervise.pending()) and time.monotonic() < deadline:
                time.sleep(0.2)
            cluster.communicate()
    assert said == "Ray has no room for 3 CPU: it has 2 CPU, of which 2 CPU are free"


def ended(code):
    """A script that starts Ray, after its end; Ray may go on to end while the folder of its sockets is removed."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"RAY_TMPDIR": folder}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", timeout=120)


@pytest.mark.slow
def test_a_process_ends_after_the_death_of_an_actor_that_verl_did_not_end():
    code = """
import os, signal, time, ray
from verl_recipes.in_verl import dead_actors

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)

class Actor:
    def pid(self):
        return os.getpid()

kinds = [ray.remote(num_cpus=0)(type(name, (Actor,), {})) for name in ("Alive", "Ended", "Killed")]
made = [kind.remote() for kind in kinds]
pids = ray.get([each.pid.remote() for each in made])
ray.kill(made[1])
time.sleep(1)
print(dead_actors.dead_actors())
os.kill(pids[2], signal.SIGKILL)
dead_actors.PATIENCE = 0
dead_actors.wait_for_a_death()
"""
    done = ended(code)
    none, *_, why = done.stdout.splitlines()  # between them, Ray says it too
    assert (done.returncode, none, why) == (1, "[]", "RuntimeError: Killed died, and verl would wait for it for ever")


def test_what_other_programs_of_a_cluster_wait_for_does_not_end_a_run():
    theirs, ours = [{"CPU": 1.0, "GPU": 1.0}, {"GPU": 4.0}], [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 1.0}]
    assert pending.of_verl([*theirs, *ours]) == ours


@pytest.mark.slow
def test_a_run_whose_queue_another_run_made_ends_before_it_uses_it():
    code = """
import ray
from verl_recipes.in_verl import dead_actors

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)

class TransferQueueController:
    def pid(self):
        return 0

if OWN:
    queue = ray.remote(num_cpus=0)(TransferQueueController).remote()
    ray.get(queue.pid.remote())
dead_actors.watch()
print("went on")
"""
    for own, status, said in ((True, 0, "went on"), (False, 1, "RuntimeError: another run is on the Ray cluster")):
        done = ended(code.replace("OWN", str(own)))
        assert done.returncode == status
        assert said in done.stdout.splitlines()[-1]


def test_a_start_for_which_ray_has_no_room_ends_once_it_said_so_twice(monkeypatch):
    monkeypatch.setattr(supervise, "ROOM", 0)
    answers = ["A", "", "B", "C", "C"]
    monkeypatch.setattr(supervise, "pending", lambda: answers.pop(0))
    asked = [(0.0, "")]
    assert [supervise.what_lacks(asked) for _ in range(4)] == [""] * 4
    line = "C, and verl would wait for ever; these CPUs are logical, and ray_kwargs.ray_init.num_cpus= raises them"
    assert supervise.what_lacks(asked) == line
    answers, others = ["3 CPU: 2 free"] * 2, "3 CPU: 1 free"  # which another program of the cluster waits for
    assert [supervise.what_lacks(asked, others) for _ in range(2)] == [""] * 2


@pytest.mark.slow
def test_a_prompt_that_verls_own_loop_would_cut_is_refused(small_data, tmp_path):
    cfg = compose("train", "hardware=h100", "model=tiny", "recipe=tiny", *small_data)
    check_prompt_lengths(cfg.data.train_files, "data.train_files", cfg)
    pq.write_table(pq.read_table(cfg.data.train_files)[:0], tmp_path / "empty.parquet")
    check_prompt_lengths([str(tmp_path / "empty.parquet")], "data.train_files", cfg)
    cfg.data.max_prompt_length = 10
    with pytest.raises(
        UserError, match=r"has \d+ tokens .* cut off its beginning at data\.max_prompt_length=10: raise"
    ):
        check_prompt_lengths(cfg.data.train_files, "data.train_files", cfg)
    cfg.data.filter_overlong_prompts = True  # verl leaves it out
    check_prompt_lengths(cfg.data.train_files, "data.train_files", cfg)
    cfg = compose("train", "data.max_prompt_length=10", *small_data)  # the CPU's loop raises
    check_prompt_lengths(cfg.data.train_files, "data.train_files", cfg)


@pytest.mark.slow
def test_compiled_kernels_outlive_a_run_and_a_users_own_settings_stay(monkeypatch, tmp_path):
    """verl turns vLLM's cache off unless the environment says otherwise, and TMPDIR is the run's scratch folder."""
    cfg, run = compose("train", "hardware=h100"), RunFolder(tmp_path)
    for name in ("VLLM_DISABLE_COMPILE_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    environment = start.environment_of(cfg, run)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/cache/countdown-zero/inductor"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from verl.trainer.constants_ppo import PPO_RAY_RUNTIME_ENV, get_ppo_ray_runtime_env

    assert PPO_RAY_RUNTIME_ENV["env_vars"]["VLLM_DISABLE_COMPILE_CACHE"] == "1"
    assert "VLLM_DISABLE_COMPILE_CACHE" not in get_ppo_ray_runtime_env()["env_vars"]
    assert os.environ["VLLM_DISABLE_COMPILE_CACHE"] == "0"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    assert start.environment_of(cfg, run)["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


def test_vllm_is_told_to_do_without_flashinfer_where_that_is_missing(monkeypatch, tmp_path):
    """vLLM 0.24 would end at a Llama; seen on an H100."""
    cfg, run, name = compose("train", "hardware=h100"), RunFolder(tmp_path), "VLLM_USE_FLASHINFER_SAMPLER"
    monkeypatch.delenv(name, raising=False)
    for found, told in ((None, "0"), ("there", None)):
        monkeypatch.setattr(start, "find_spec", lambda _, found=found: found)
        assert start.environment_of(cfg, run).get(name) == told
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(start, "find_spec", lambda _: None)
    assert start.environment_of(cfg, run)[name] == "1"


@pytest.mark.slow
def test_rank_and_engine_meet_at_a_socket_in_the_runs_own_folder_if_both_are_this_projects(monkeypatch, tmp_path):
    """verl's address is by Ray's job number alone, so two runs on one machine would have the same."""
    from verl.workers.config import RolloutConfig
    from verl.workers.rollout.vllm_rollout import ServerAdapter
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    from verl_recipes.in_verl import weight_socket

    handle = "ipc:///tmp/rl-colocate-zmq-01-replica-0-rank-0.sock"

    def sender(self, config):
        self.config, self.zmq_handle = config, handle

    monkeypatch.setattr(ServerAdapter, "__init__", sender)  # the real ones ask a running Ray for its job
    monkeypatch.setattr(vLLMColocateWorkerExtension, "_get_zmq_handle", lambda self: handle)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kwargs = compose("train", "hardware=h100").actor_rollout_ref.rollout.engine_kwargs
    own = handle.replace("/tmp", str(tmp_path))
    assert weight_socket.OwnServerAdapter(RolloutConfig(name="vllm", engine_kwargs=dict(kwargs))).zmq_handle == own
    assert object.__new__(weight_socket.WorkerExtension)._get_zmq_handle() == own
    # With stock verl's configuration the engine's end is verl's, and so is the rank's.
    assert weight_socket.OwnServerAdapter(RolloutConfig(name="vllm")).zmq_handle == handle


@pytest.mark.slow
def test_a_row_may_set_its_own_sampling_and_changes_that_of_no_other(monkeypatch):
    """Each row of an evaluation has a seed, and a greedy one temperature 0."""
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    from verl_recipes.in_verl.row_sampling import RowSampling

    async def given(self, sampling_params, **kwargs):
        return sampling_params

    monkeypatch.setattr(SingleTurnAgentLoop, "run", given)
    loop, common = RowSampling.__new__(RowSampling), {"temperature": 1.0, "top_p": 1.0}
    own = {"seed": 7, "temperature": 0.0}
    assert asyncio.run(loop.run(common, extra_info={"sampling": own})) == {"top_p": 1.0} | own
    assert asyncio.run(loop.run(common, extra_info={})) == common == {"temperature": 1.0, "top_p": 1.0}
    (entry,) = OmegaConf.load(CONFIGS / "evaluate" / "agent_loop.yaml")
    assert hydra.utils.get_class(entry._target_) is RowSampling
