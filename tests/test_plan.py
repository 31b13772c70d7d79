"""Plan: memory against arithmetic by hand, time against published runs, the machine's memory and disk, and refusals."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from configurations import compose
from huggingface_hub import constants
from omegaconf import OmegaConf
from pages import commands, repeats
from rich.console import Console

from data_prep.cli import CONFIGS, UserError
from data_prep.sources import files_in
from verl_recipes import plan
from verl_recipes.planning import estimate, model, space, tracking
from verl_recipes.planning import memory as plan_memory
from verl_recipes.planning import time as plan_time
from verl_recipes.planning.memory import GIB
from verl_recipes.planning.model import facts
from verl_recipes.planning.tracking import Pass
from verl_recipes.run import machine, preflight
from verl_recipes.run import model as checks

ROOT = CONFIGS.parent


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """tests/run.sh sets HF_HUB_OFFLINE, and here models of the hub are planned for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What these tests track, they track anew, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def qwen(**changes):
    """A pass over Qwen2.5-3B on four ranks, or over another number of its layers."""
    architecture = OmegaConf.load(CONFIGS / "model" / "qwen2.5_3b.yaml").architecture
    shape = plan_memory.shape_of(OmegaConf.create({"architecture": architecture})) | changes
    return Pass(
        shape=json.dumps(shape, sort_keys=True),
        ranks=4,
        fsdp_size=4,
        rows=1,
        tokens=256,
        train=True,
        optimizer="AdamW",
        value_head=False,
        model_dtype="fp32",
        param_dtype="bf16",
        reduce_dtype="fp32",
        reshard=True,
        checkpointing=True,
        lora="",
        scaled=False,
        entropy=False,
        fused=False,
        flash=True,
    )


def by_hand(layers):
    """Parameters of Qwen2.5-3B with this many layers, weight by weight; embedding and head are one."""
    hidden, inner, key_value = 2048, 11008, 2 * 128
    attention = 2 * hidden * hidden + 2 * hidden * key_value + hidden + 2 * key_value  # q, o; k, v; biases of q, k, v
    return 151936 * hidden + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


def assert_as_by_hand(layers):
    tracked = tracking.track(qwen(num_hidden_layers=layers))
    share = 4 * by_hand(layers) / 4  # fp32, of four ranks
    assert tracked["parameters"] == pytest.approx(share, rel=0.01)
    assert tracked["gradients"] == pytest.approx(share, rel=0.01)
    assert tracked["optimizer"] == pytest.approx(2 * share, rel=0.01)  # Adam's two moments, sharded


@pytest.mark.slow
def test_parameters_gradients_and_optimizer_of_two_layers_are_as_by_hand():
    assert_as_by_hand(2)


@pytest.mark.slow
def test_sgd_holds_nothing_from_one_step_to_the_next():
    assert tracking.track(replace(qwen(num_hidden_layers=2), optimizer="SGD"))["optimizer"] == 0


@pytest.mark.long
def test_parameters_gradients_and_optimizer_of_qwen_3b_are_as_by_hand():
    assert by_hand(36) == 3_085_938_688
    assert_as_by_hand(36)


@pytest.mark.slow
def test_logits_take_two_bytes_a_token_and_word_and_a_temperature_makes_a_copy():
    words = 8192 * 151936  # so many that the peak is there
    plain = tracking.track(replace(qwen(num_hidden_layers=1), tokens=8192))
    scaled = tracking.track(replace(qwen(num_hidden_layers=1), tokens=8192, scaled=True))
    assert (plain["logits"], scaled["logits"]) == (2 * words, 4 * words)


@pytest.mark.slow
def test_fused_kernels_hold_no_logits_of_a_whole_micro_batch():
    def held(fused, tokens):
        work = replace(qwen(num_hidden_layers=1), fused=fused, train=False, tokens=tokens)
        return sum(tracking.track(work).values())

    whole, fused = (held(kind, 8192) - held(kind, 4096) for kind in (False, True))
    assert whole - fused > 0.95 * 2 * 4096 * 151936


@pytest.mark.slow
def test_lora_trains_adapters_alone():
    small = replace(qwen(num_hidden_layers=1), model_dtype="bf16", lora=json.dumps([8, "all-linear"]))
    tracked = tracking.track(small)
    linears = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 11008), (2048, 11008), (11008, 2048)]
    adapters = sum(8 * (a + b) for a, b in linears)
    assert tracked["gradients"] == pytest.approx(2 * adapters / 4, rel=0.01)
    assert tracked["parameters"] == pytest.approx(2 * (by_hand(1) + adapters) / 4, rel=0.01)


@pytest.mark.slow
def test_a_plan_is_tracked_only_once(monkeypatch):
    small = qwen(num_hidden_layers=1)
    first = tracking.cached(small)
    monkeypatch.setattr(tracking, "track", lambda work: pytest.fail("tracked again"))
    monkeypatch.setattr(tracking, "getsource", lambda function: "")
    with pytest.raises(pytest.fail.Exception):
        tracking.cached(small)  # other code, another answer
    monkeypatch.undo()
    assert first


def test_the_kv_cache_is_what_vllms_share_leaves():
    cfg = compose("train", "recipe=mini_r1", "model=qwen2.5_3b_instruct", "hardware=a800_x4")
    held = plan_memory.vllm(cfg, 80 * GIB)
    assert held["weights"] == 2 * 3_085_938_688
    share = cfg.actor_rollout_ref.rollout.gpu_memory_utilization * 80 * GIB
    assert held["weights"] + held["kv_cache"] + held["other"] == pytest.approx(share)
    a_token = 2 * 36 * 2 * 128 * 2  # keys and values, layers, heads, width, bytes
    sequences = held["kv_cache"] / (a_token * (256 + 1024))
    assert held["sequences"] == pytest.approx(min(sequences, cfg.actor_rollout_ref.rollout.max_num_seqs))


SMALL = ["model=tiny", "hardware=a800_x1", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024"]


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_setting_to_turn_unless_forced(monkeypatch):
    cfg = compose("train", *SMALL, "actor_rollout_ref.rollout.gpu_memory_utilization=0.01")
    problems = plan.show(cfg, Console(file=StringIO()))
    assert len(problems) == 1
    assert "gpu_memory_utilization or tensor_model_parallel_size higher" in problems[0]
    fits = compose("train", *SMALL)
    assert plan.show(fits, Console(file=StringIO())) == []
    monkeypatch.setattr(plan, "show", lambda cfg, console: problems)
    main = inspect.unwrap(plan.main)
    with pytest.raises(UserError, match=r"does not fit.*force=true"):
        main(cfg)
    cfg.force = True
    main(cfg)


def test_a_topology_that_leaves_no_gpu_to_train_is_one_line():
    with pytest.raises(UserError, match="none left to train"):
        estimate.estimate(compose("train", "hardware=a800_x1", "topology=split"))


@pytest.mark.slow
def test_too_much_is_named_by_phase_and_every_advice_is_a_key_of_the_configuration():
    cfg = compose("train", *SMALL, "recipe=tinyzero_ppo")
    memory = plan_memory.phases(cfg, 79.1 * GIB)
    assert {"generate", "old log-probabilities", "reference", "update critic", "update actor"} <= memory.keys()
    grown = {phase: parts | {"logits": 100.0 * GIB} for phase, parts in memory.items()}
    lines = estimate.misfits(cfg, grown, model.facts("gpus")["a800"], sequences=1.0)
    assert [line.split(":")[0] for line in lines] == list(memory)
    for key in re.findall(r"(?:actor_rollout_ref|critic)\.[\w.]+\w", " ".join(lines)):
        assert OmegaConf.select(cfg, key, default="absent") != "absent", key


@pytest.mark.slow
def test_offload_takes_a_model_at_rest_off_the_gpu():
    def generating(offload):
        keys = [f"actor_rollout_ref.actor.fsdp_config.{k}={offload}" for k in ("param_offload", "optimizer_offload")]
        adam = "actor_rollout_ref.actor.optim.optimizer=AdamW"
        return plan_memory.phases(compose("train", *SMALL, *keys, adam), 79.1 * GIB)["generate"]

    assert (generating(True)["parameters"], generating(True)["optimizer"]) == (0, 0)
    assert generating(False)["optimizer"] == pytest.approx(2 * generating(False)["parameters"], rel=1e-3)


def test_more_gpus_take_less_time_and_longer_responses_more():
    gpu = model.facts("gpus")["a800"]
    shape = json.loads(qwen().shape)
    work = plan_time.Work(
        shape=shape, train_gpus=4, rollout_gpus=4, sequences=192, groups=24, prompt=256, response=1024, micro_batches=4
    )
    step = plan_time.seconds(work, gpu)["step"]
    assert plan_time.seconds(replace(work, train_gpus=8, rollout_gpus=8), gpu)["step"] < step
    assert plan_time.seconds(replace(work, response=4096), gpu)["step"] > step
    parts = plan_time.seconds(work, gpu)
    assert parts.pop("step") == pytest.approx(sum(parts.values()))


def test_the_price_is_that_of_the_gpu_hours_in_any_currency():
    a800, h100 = (model.facts("gpus")[name] for name in ("a800", "h100"))
    assert estimate.price_of(compose("train"), a800) == ([5.5, 7.0], "yuan")
    assert estimate.price_of(compose("train"), h100) is None
    assert estimate.price_of(compose("train", "plan.price=2.5", "plan.currency=EUR"), h100) == ([2.5, 2.5], "EUR")
    assert plan.price_text(["330", "420", "yuan"]) == "330-420 yuan"


@pytest.mark.slow
def test_lora_holds_the_whole_base_beside_vllm_where_weights_are_sent_and_a_copy_of_it_in_the_machines_memory():
    """verl 0.9.1 brings an offloaded model to the GPU to merge its adapter, and keeps the base for afterwards."""
    cfg = compose("train", "recipe=tinyzero_grpo", "model=qwen2.5_7b", "hardware=rtx4090_x2")
    count = model.parameter_count(cfg)
    sent = plan_memory.phases(cfg, 23.5 * GIB)["weights to vllm"]
    assert sent["parameters"] == pytest.approx(4 * count / 2, rel=0.02)
    assert sum(sent.values()) > 23.5 * GIB
    processes = 2 * facts("assumptions")["machine"]["gpu_gib"] * GIB
    assert space.memory(cfg, count, True).need == processes + 2 * 4 * count


@pytest.mark.slow
@pytest.mark.parametrize(("name", "copies"), [("qwen2.5_3b", 6), ("qwen2.5_7b", 1)])
def test_each_process_loads_a_model_whose_embedding_is_shared_and_one_loads_another(name, copies):
    cfg = compose("train", "recipe=gspo", f"model={name}", "hardware=a800_x8", "topology=split")
    cfg.actor_rollout_ref.actor.fsdp_config.optimizer_offload = False
    processes = 8 * facts("assumptions")["machine"]["gpu_gib"] * GIB
    count = model.parameter_count(cfg)
    assert space.memory(cfg, count, True).need == processes + copies * 4 * count


PPO_7B = ["recipe=tinyzero_ppo", "model=qwen2.5_7b", "hardware=a800_x8"]


def test_a_7b_with_a_critic_needs_182_gb_a_checkpoint_and_is_refused_with_73_free(tmp_path, monkeypatch):
    """Weights and two moments in fp32, twice; the free disk is the one thing that no test can have for real."""
    cfg = compose("train", *PPO_7B, f"run_dir='{tmp_path}'")
    count = model.parameter_count(cfg)
    assert count == 7_615_616_512
    assert space.checkpoint_bytes(cfg, count) == 24 * count == pytest.approx(182e9, rel=0.01)
    monkeypatch.setattr(space, "free_disk", lambda folder: 73 * 10**9)
    monkeypatch.setattr(space, "free_memory", lambda: 10**12)
    short = [each for each in space.needs(cfg, tmp_path) if each.free < each.need]
    assert any("3 checkpoints of 170.2 GiB" in str(each) for each in short)
    with pytest.raises(UserError, match=r"3 checkpoints of 170\.2 GiB"):
        preflight.check_space(cfg, tmp_path)
    found = [line for line in machine.space(gpu=True, cfg=cfg) if line.state == "wrong"]
    assert [line.text for line in found] == [str(each) for each in short]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optim.optimizer", "AdamW", 12),
        ("optim.optimizer", "SGD", 4),
        ("fsdp_config.model_dtype", "bf16", 6),
        ("checkpoint.save_contents", ["model", "hf_model"], 8),
        ("checkpoint.save_contents", ["model", "optimizer", "extra", "hf_model"], 16),
    ],
)
def test_a_checkpoint_is_counted_by_what_it_holds(key, value, expected):
    cfg = compose("train", *SMALL, "actor_rollout_ref.actor.optim.optimizer=AdamW")
    OmegaConf.update(cfg.actor_rollout_ref.actor, key, value)
    assert space.checkpoint_bytes(cfg, 1000) == 1000 * expected


def test_the_moments_of_an_adapter_are_not_those_of_the_whole_model():
    cfg = compose("train", *SMALL, "actor_rollout_ref.actor.optim.optimizer=AdamW")
    cfg.actor_rollout_ref.model.lora_rank = 8
    assert space.checkpoint_bytes(cfg, 1000) == 4000


def test_a_plan_needs_no_model_and_no_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checks.check_same_model(compose("train", "model=qwen2.5_3b", "hardware=h100"))


@pytest.mark.slow
def test_the_disk_must_hold_the_samples_of_all_steps():
    steps = "trainer.total_training_steps"
    few, many, none = (space.samples_bytes(compose("train", f"{steps}={count}"), True) for count in (10, 1000, 1))
    assert (many, none) == (pytest.approx(100 * few), pytest.approx(few / 10))
    assert space.samples_bytes(compose("train"), False) == 0


def test_checkpoints_are_no_more_than_the_run_saves_and_those_on_the_disk_count(tmp_path):
    cfg = compose("train", *PPO_7B, f"run_dir='{tmp_path}'")
    cfg.trainer.total_training_steps, cfg.trainer.save_freq = 100, 100
    assert space.checkpoints_at_once(cfg) == 1
    cfg.trainer.save_freq = 50
    assert space.checkpoints_at_once(cfg) == 2
    cfg.trainer.save_freq, cfg.trainer.max_actor_ckpt_to_keep = 10, None
    assert space.checkpoints_at_once(cfg) == 10
    whole = sum(each.need for each in space.disks(cfg, tmp_path, 10**6, trains=True))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "file").write_bytes(bytes(1000))
    assert sum(each.need for each in space.disks(cfg, tmp_path, 10**6, trains=True)) == whole - 1000
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "1.jsonl.gz").write_bytes(bytes(1000))
    assert sum(each.need for each in space.disks(cfg, tmp_path, 10**6, trains=True)) == whole - 2000
    assert sum(each.need for each in space.disks(cfg, tmp_path, 10**6, trains=False)) < whole


def test_the_weights_of_a_checkpoint_are_counted_from_its_shards(tmp_path):
    for rank in range(2):
        (tmp_path / f"model_world_size_2_rank_{rank}.pt").write_bytes(b"\0" * 4000)
    cfg = compose("train", "model=local", f"actor_rollout_ref.model.path='{tmp_path}'")
    assert model.parameter_count(cfg) == 2000


def test_a_models_weights_are_counted_from_their_headers():
    assert model.count_in_files(ROOT / "assets" / "tiny_base") == 502_912


@pytest.fixture
def cached_model(tmp_path, monkeypatch):
    """A hub's model in a Hugging Face cache, of whose files nothing lies in the working directory."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0"
    shutil.copytree(ROOT / "assets" / "tiny_base", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0", encoding="utf-8")
    return snapshot


@pytest.mark.slow
def test_a_model_in_the_cache_is_one_for_preflight_and_doctor_without_a_network(cached_model):
    lengths = ["data.max_prompt_length=32", "data.max_response_length=64"]  # its context is 512
    cfg = compose("train", "model=local", "actor_rollout_ref.model.path=some/model", *lengths)
    checks.check_model("some/model")
    assert machine.Line("ok", f"model: some/model in {cached_model}") in machine.refusals(cfg=cfg)
    assert model.parameter_count(cfg) == 502_912
    next(cached_model.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, and the .* has no \*.safetensors") as error:
        checks.check_model("some/model")
    assert machine.Line("wrong", *error.value.message.split("; ")) in machine.refusals(cfg=cfg)
    with pytest.raises(UserError, match="does not hold it; unset HF_HUB_OFFLINE"):
        checks.check_model("other/model")


def test_a_model_that_verl_takes_from_modelscope_needs_its_package(monkeypatch):
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "true")
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="VERL_USE_MODELSCOPE=true needs the package modelscope"):
        checks.check_model("some/model")
    monkeypatch.setattr(model, "find_spec", lambda name: name)
    assert checks.check_model("some/model") == {"revision": model.OF_MODELSCOPE}  # a hub's is another one


def as_nobody(act):
    """What an act raises, as text, in a process of another user; root may read everything."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setgid(65534)
        os.setuid(65534)
        try:
            act()
            os.write(writer, b"nothing")
        except BaseException as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(reader, 4096).decode()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_without_read_permission_is_not_called_damaged(name):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        shutil.copytree(ROOT / "assets" / "tiny_base", Path(folder) / "model")
        (Path(folder) / "model" / name).chmod(0o600)
        told = as_nobody(lambda: checks.check_model(f"{folder}/model"))
    assert f"{name} cannot be read by this user" in told


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_data_without_read_permission_is_not_called_damaged():
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".parquet") as file:  # mode 0600
        told = as_nobody(lambda: preflight.check_parquet(file.name, "data.train_files"))
    assert f"{file.name} cannot be read by this user" in told


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_records_in_a_folder_without_read_permission_are_not_left_out():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder, "closed").mkdir(mode=0o700)
        Path(folder, "open.csv").touch()
        os.chmod(folder, 0o755)
        told = as_nobody(lambda: files_in(Path(folder)))
    assert "Permission denied" in told
    assert f"{folder}/closed" in told


@pytest.mark.slow
def test_plan_refuses_before_it_loads_torch():
    code = (
        "import sys; from verl_recipes import plan\n"
        "try: plan.main()\n"
        "except SystemExit as error: print(error, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "hardware=a800", "topology=split"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.stdout.endswith("topology=colocated False\n"), result.stdout + result.stderr


@pytest.mark.long
def test_the_pages_for_one_card_repeat_their_plans():
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("docs/one_card.md", "docs/zh/one_card.md")]
    runs = [each for module, each in commands("docs/one_card.md") if module == "verl_recipes.train"]
    planned = [[each for each in run if "=data/" not in each and "warm_start=" not in each] for run in runs]
    for run in planned:
        cfg = compose("train", *run)
        if estimate.gpu_of(cfg) is None:
            continue
        row = plan.sweep_row(estimate.estimate(cfg))
        longer = plan.sweep_row(estimate.estimate(compose("train", *run, "plan.response_tokens=200")))
        name = next(each for each in run if each.startswith("model=")).removeprefix("model=")
        assert row[:2] == ["yes", "generate"]
        cells = ["", f" `{cfg.card.name}` ", *(f" {each} " for each in (*row[2:6], longer[5])), ""]
        assert all(re.search(rf"\| `{name}`[^|]+{re.escape('|'.join(cells))}", page) for page in pages), cells


@pytest.mark.parametrize("name", ["docs/launch.md", "docs/zh/launch.md"])
def test_the_page_repeats_the_published_times_and_the_measured_table(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for run, said, computed in plan_time.published():
        row = next(line for line in text.splitlines() if line.startswith(f"| {run} |"))
        assert f"| {computed:.0f} |" in row
        assert said is None or f"{computed / (sum(said) / 2) - 1:+.0%}" in row
    assert repeats(name, text, (ROOT / "benchmarks" / "plan_memory.md").read_text(encoding="utf-8"))


def test_memory_is_what_a_container_or_a_job_may_still_use(tmp_path):
    everything, own = space.free_memory(tmp_path), tmp_path / "own"
    (job := tmp_path / "slurm" / "job_1").mkdir(parents=True)
    own.write_text("0::/slurm/job_1\n")
    for folder, limit in ((job, "max"), (job.parent, str(3 * 2**20))):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{2 * 2**20}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {2**20}\n")
    assert everything > 2**27
    assert space.free_memory(tmp_path, own) == 2 * 2**20  # the limit, without what is held but for droppable pages
    (old := tmp_path / "memory").mkdir()
    for name, value in (("limit_in_bytes", 2**20), ("usage_in_bytes", 2**19)):
        (old / f"memory.{name}").write_text(f"{value}\n")
    (old / "memory.stat").write_text("total_inactive_file 1\n")
    assert space.free_memory(tmp_path, own) == 2**19 + 1


def test_passes_that_differ_in_nothing_that_counts_are_tracked_once():
    fused = plan_memory.passes(compose("train", *SMALL, "recipe=tinyzero_grpo"))
    assert fused["log_probs"] == fused["reference"]
    whole = ["recipe=tinyzero_grpo", "actor_rollout_ref.model.use_fused_kernels=false"]
    apart = plan_memory.passes(compose("train", *SMALL, *whole))
    assert apart["log_probs"] != apart["reference"]  # the entropy
