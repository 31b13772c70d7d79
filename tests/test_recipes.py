"""Recipes on models and hardware: they compose, and verl's and vLLM's own validation takes them, or one line says why.

Every pair of recipe and hardware, of recipe and model, and of model and hardware is in PAIRS, for `tests/run.sh --all`;
all triples are some 800.
"""

import asyncio
import json
import shutil
import subprocess
import sys

import pytest
import vllm_arguments as vllm_arguments_of_gpus
from configurations import compose, options
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data_prep.cli import CONFIGS, UserError
from verl_recipes.settings.configuration import batch_for_ranks, check_choice, longest

ROOT = CONFIGS.parent


RECIPES, HARDWARE = options("recipe"), options("hardware")
# With an architecture of their own; the others differ from one of these in their path alone.
MODELS = [name for name in options("model") if OmegaConf.load(CONFIGS / "model" / f"{name}.yaml").get("architecture")]
# A card's own name composes to what NAME_x1 does; cards of one kind differ in their name alone (a test below).
HARDWARE = [name for name in HARDWARE if not name.endswith("_x1") and not name.startswith(("h100", "h800", "rtx5090"))]
PAIRS = [
    (RECIPES[(i + j) % len(RECIPES)], model, hardware)
    for i, hardware in enumerate(HARDWARE)
    for j, model in enumerate(MODELS)
]
# Each option at least once.
SOME = [
    (RECIPES[i % len(RECIPES)], MODELS[(i + i // len(RECIPES)) % len(MODELS)], HARDWARE[i % len(HARDWARE)])
    for i in range(max(len(RECIPES), len(MODELS), len(HARDWARE)))
]
SPLIT = [("mini_r1", "qwen2.5_3b", "h100_x4"), ("tinyzero_ppo", "qwen2.5_3b", "a800_x3"), ("mini_r1", "tiny", "cpu")]
SMALL = {"cpu": 2e8} | dict.fromkeys(("a800", "l40s", "rtx4090", "rtx4090_x2"), 4e9)  # most parameters


def of(recipe, model="qwen2.5_3b", hardware="a800_x4", *more):
    return compose("train", f"recipe={recipe}", f"model={model}", f"hardware={hardware}", *more)


def refusal(cfg):
    """The one line that refuses a configuration, or none."""
    try:
        check_choice(cfg)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_option_composes_and_too_large_a_model_is_refused_in_one_line(hardware):
    """Recipes and models take turns over the hardware; all pairs are in the slow test below."""
    i = HARDWARE.index(hardware)
    cfg = of(RECIPES[(i + 1) % len(RECIPES)], MODELS[i % len(MODELS)], hardware)
    OmegaConf.to_container(cfg, resolve=True)
    most = SMALL.get(hardware, 8e9)
    assert (refusal(cfg) is not None) == (cfg.architecture.parameters > most)
    for parameters, allowed in ((most, True), (most + 1e8, False)):
        cfg.architecture.parameters = int(parameters)
        assert (refusal(cfg) is None) == allowed


@pytest.mark.slow
def test_an_old_name_of_hardware_is_a_card_and_a_number():
    assert of("datawhale_r1") == of("datawhale_r1", "qwen2.5_3b", "a800", "gpus=4")


@pytest.mark.parametrize(("card", "kind"), [("h100", "a800"), ("h800", "a800"), ("rtx5090", "rtx4090")])
def test_cards_of_one_kind_differ_in_their_name_alone(card, kind):
    files = [OmegaConf.load(CONFIGS / "hardware" / f"{name}.yaml") for name in (card, kind)]
    assert [file.pop("card") for file in files] == [{"name": card}, {"name": kind}]
    assert files[0] == files[1]


@pytest.mark.slow
def test_several_trackers_and_a_local_model_compose():
    options_of_all = ",".join(options("tracker"))
    local = ["model=local", "actor_rollout_ref.model.path=my/model", "tuning=lora"]
    cfg = compose("train", "recipe=mini_r1", "hardware=rtx4090_x1", f"tracker=[{options_of_all}]", *local)
    assert set(cfg.trainer.logger) == {*options("tracker"), "file"}
    assert refusal(cfg) is None
    OmegaConf.to_container(cfg, resolve=True)


@given(st.integers(1, 600), st.sampled_from([1, 4, 16]), st.integers(1, 16), st.integers(1, 4), st.integers(1, 8))
def test_a_batch_is_the_nearest_that_all_ranks_share(prompts, updates, n, nodes, ranks_per_node):
    def shared(batch):
        return batch % updates == 0 and batch // updates * n % (nodes * ranks_per_node) == 0

    batch = batch_for_ranks(prompts, updates, n, nodes, ranks_per_node)
    assert batch > 0
    assert shared(batch)
    nearer = range(max(prompts - abs(batch - prompts) + 1, 1), prompts + abs(batch - prompts))
    assert not any(shared(other) for other in nearer)


@pytest.mark.slow
def test_three_gpus_keep_the_prompts_a_step_as_near_as_they_can():
    batches = {name: of(name, hardware="a800_x3").data.train_batch_size for name in ("tinyzero_ppo", "datawhale_r1")}
    assert batches == {"tinyzero_ppo": 258, "datawhale_r1": 15}
    split = of("datawhale_r1", "qwen2.5_3b_instruct", "a800_x3", "topology=split")
    assert (split.trainer.n_gpus_per_node, split.actor_rollout_ref.rollout.n_gpus_per_node) == (2, 1)
    assert split.data.train_batch_size == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "ahead", "mode"),
    [
        ("colocated", 0, "sync"),
        ("split", 0, "separate_async"),
        ("colocated_async", 2, "colocate_async"),
        ("split_async", 2, "separate_async"),
    ],
)
def test_a_topology_has_verls_trainer_its_sampler_and_its_bound_of_staleness(topology, ahead, mode):
    cfg = of("tiny", "tiny", "cpu", f"topology={topology}", *([f"staleness={ahead}"] if ahead else []))
    v1 = cfg.trainer.v1
    assert (v1.trainer_mode, v1.sampler.custom_sampler.name.endswith("Async")) == (mode, mode != "sync")
    if mode != "sync":
        assert v1[mode].num_warmup_batches == ahead
    if ahead:
        assert (v1.sampler.max_off_policy_threshold, v1.sampler.max_off_policy_strategy) == (3, "wait")
    assert cfg.trainer.n_gpus_per_node == (1 if "split" in topology else 2)
    assert refusal(cfg) is None


@pytest.mark.parametrize("hardware", ["a800_x4", "l40s gpus=4", "rtx4090 gpus=4"])
def test_with_several_updates_a_split_keeps_the_weights_that_train_on_the_gpu(hardware):
    """verl's copy of a step's first weights is none of offloaded ones, and all updates but the last would be lost."""
    name, *gpus = hardware.split()
    cfg = of("tinyzero_grpo", "qwen2.5_1.5b", name, "topology=split", "updates=2", "tuning=full", *gpus)
    assert not cfg.actor_rollout_ref.actor.fsdp_config.param_offload
    assert refusal(cfg) is None
    for key in ("param_offload", "offload_policy"):
        cfg = of("tinyzero_grpo", "qwen2.5_1.5b", name, "topology=split", "updates=2", "tuning=full", *gpus)
        cfg.actor_rollout_ref.actor.fsdp_config[key] = True
        assert "cannot keep the weights of a step's beginning on offloaded weights" in refusal(cfg)
        cfg.algorithm.rollout_correction.bypass_mode = True
        assert refusal(cfg) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.n_gpus_per_node=0"], "no rank is left to train; leave it out"),
        (["trainer.n_gpus_per_node=0", "trainer.v1.trainer_mode=separate_async"], "takes a GPU for generation"),
        (["card.most_parameters=3e9"], "3.1 billion parameters"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=4", "architecture.num_attention_heads=14"], "14 heads"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=3"], "does not divide 4 GPUs"),
        (["data.train_batch_size=15", "trainer.n_gpus_per_node=7"], "shared evenly by 7 ranks"),
        (["data.train_batch_size=15", "actor_rollout_ref.actor.ppo_mini_batch_size=4"], "must be whole mini-batches"),
        (["actor_rollout_ref.rollout.n=1"], "rollout.n must be 2 or more"),
        (["data.max_response_length=20000"], "do not fit a micro-batch"),
        (["algorithm.adv_estimator=gae", "actor_rollout_ref.model.lora_rank=8"], "cannot train a critic beside a LoRA"),
        (["algorithm.adv_estimator=remax"], "does not give it the reward of a greedy response"),
        (["algorithm.adv_estimator=optimal_token_baseline"], "does not give it sum_pi_squared"),
        (
            ["algorithm.rollout_correction.bypass_mode=true", "algorithm.rollout_correction.rollout_is=token"],
            "correction= has no effect",
        ),
        (
            ["algorithm.rollout_correction.bypass_mode=true", "algorithm.rollout_correction.loss_type=reinforce"],
            "correction= has no effect",
        ),
        (
            ["algorithm.rollout_correction.rollout_is=token", "actor_rollout_ref.rollout.calculate_log_probs=false"],
            "need the rollout's log-probabilities",
        ),
        (["trainer.device=cpu", "trainer.v1.trainer_mode=separate_async", "updates=2"], "bypass_mode=true"),
        (["staleness=1"], "choose topology=colocated_async"),
        (
            ["reward.custom_reward_function.path=pkg://reward_score.random_control", "reward.num_workers=8"],
            "add reward.num_workers=1",
        ),
        (["staleness=1", "trainer.v1.trainer_mode=separate_async"], "choose topology=split_async"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(overrides, message):
    cfg = OmegaConf.merge(of("datawhale_r1"), OmegaConf.from_dotlist(overrides))
    assert message in refusal(cfg)
    assert "\n" not in refusal(cfg)


@pytest.mark.parametrize(("generating", "refused"), [(3, True), (1, False), (2, False)])
def test_an_engine_of_vllm_takes_no_part_of_two_machines(generating, refused):
    split = ("gpus=8", "nodes=2", "topology=split", f"actor_rollout_ref.rollout.n_gpus_per_node={generating}")
    cfg = of("mini_r1", "qwen2.5_3b_instruct", "h100", *split, "actor_rollout_ref.rollout.tensor_model_parallel_size=2")
    assert (f"does not divide {generating} GPUs" in str(refusal(cfg))) == refused


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny", "tinyzero_ppo", "mini_r1", "dapo"])  # the others have one of theirs
def test_lora_trains_at_ten_times_the_recipes_own_rate(recipe):
    full = of(recipe, "tiny", "cpu").actor_rollout_ref.actor.optim
    lora = of(recipe, "tiny", "cpu", "tuning=lora").actor_rollout_ref.actor.optim
    assert lora.lr == float(f"{full.lr * 10:.12g}") > 0
    assert {key: lora[key] for key in lora if key != "lr"} == {key: full[key] for key in full if key != "lr"}


@pytest.mark.slow
def test_a_rate_on_the_command_line_wins_over_the_tunings():
    cfg = of("tiny", "tiny", "cpu", "tuning=lora", "actor_rollout_ref.actor.optim.lr=0.5")
    assert cfg.actor_rollout_ref.actor.optim.lr == 0.5
    cfg = of("tiny", "tiny", "cpu", "tuning=lora", "learning_rate=0.5")
    assert cfg.actor_rollout_ref.actor.optim.lr == 5.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_the_middle_models_positions(recipe):
    assert longest(compose("train", f"recipe={recipe}", "model=middle")) <= 1024


@pytest.mark.slow
def test_a_recipe_brings_its_prompt_data_and_reward_and_the_tiny_model_its_own():
    cfg = of("mini_r1", "tiny", "cpu")
    assert (cfg.prompt.name, cfg.data.train_files) == ("tinyzero_base", "data/tiny/train.parquet")
    assert cfg.reward.custom_reward_function.reward_kwargs.profile == "mini_r1"
    cfg = of("datawhale_r1_article")
    assert (cfg.prompt.name, cfg.reward.custom_reward_function.reward_kwargs.profile) == (
        "datawhale_r1",
        "datawhale_r1_article",
    )
    assert cfg.data.made_by.startswith("python -m data_prep source=hub split=datawhale_r1 prompt=datawhale_r1 ")


@pytest.mark.parametrize("recipe", ["tinyzero_ppo", "datawhale_r1"])
def test_the_command_that_makes_a_recipes_data_is_one_of_data_preps(recipe):
    made_by = of(recipe).data.made_by.split()
    prepare = compose("prepare", *made_by[3:])
    assert prepare.prompt == of(recipe).prompt
    assert of(recipe).data.train_files == f"{prepare.out}/train.parquet"


@pytest.mark.slow
def test_an_unknown_option_lists_the_known_ones_in_one_message():
    command = [sys.executable, "-m", "verl_recipes.train", "recipe=grpo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert all(recipe in result.stderr for recipe in RECIPES)


@pytest.mark.parametrize("name", ["tiny", "middle", *(f"qwen2.5_{size}" for size in ("0.5b", "1.5b", "3b", "7b"))])
def test_the_parameters_follow_from_the_architecture(name):
    """Counted for Qwen2: embeddings, and in each layer two norms, biased q, k, v, o, and three matrices."""
    a = OmegaConf.load(CONFIGS / "model" / f"{name}.yaml").architecture
    hidden, kv = a.hidden_size, a.hidden_size // a.num_attention_heads * a.num_key_value_heads
    attention = hidden * (hidden + 1) + 2 * kv * (hidden + 1) + hidden * hidden
    layer = attention + 3 * hidden * a.intermediate_size + 2 * hidden
    embeddings = a.vocab_size * hidden * (1 if a.tie_word_embeddings else 2)
    assert a.parameters == embeddings + a.num_hidden_layers * layer + hidden


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_those_of_the_model_that_transformers_builds(name):
    from verl_recipes.planning.memory import parameters_of, shape_of

    cfg = OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
    assert parameters_of(shape_of(cfg)) == cfg.architecture.parameters


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that makes a model folder, without weights, of a configuration's architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def make(cfg):
        path = tmp_path_factory.mktemp("model")
        shutil.copytree(ROOT / "assets" / "tiny_base", path, dirs_exist_ok=True)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config |= OmegaConf.to_container(cfg.architecture) | {"layer_types": None, "max_position_embeddings": 32768}
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return path

    return make


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [SOME, pytest.param(PAIRS, marks=pytest.mark.long)], ids=["some", "every-pair"])
def test_what_goes_together_passes_verls_validation_and_vllms_argument_parser(chosen, folder_of, monkeypatch):
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    folders, parsed, asked_of_gpus, allowed = {}, set(), set(), 0
    for recipe, model, hardware, *more in [*chosen, *((*each, "topology=split") for each in SPLIT)]:
        cfg = of(recipe, model, hardware, *more)
        too_large = cfg.architecture.parameters > SMALL.get(hardware, 8e9)
        no_critic = recipe == "tinyzero_ppo" and (hardware.startswith("rtx") or model.startswith("gemma3"))
        refused = refusal(cfg) is not None
        assert refused == (too_large or no_critic), (recipe, model, hardware, refusal(cfg))
        if refused:
            continue
        allowed += 1
        if model not in folders:
            folders[model] = folder_of(cfg)
        cfg.actor_rollout_ref.model.path = str(folders[model])
        OmegaConf.resolve(cfg)
        validate_config(cfg, need_reference_policy(cfg), need_critic(cfg))
        parts = [cfg.algorithm, cfg.critic, cfg.actor_rollout_ref.actor, cfg.actor_rollout_ref.model]
        for part in [*parts, cfg.trainer.v1.separate_async.hybrid_rollout]:
            omega_conf_to_dataclass(part)
        get_reward_manager_cls(cfg.reward.reward_manager.name)
        rollout = cfg.actor_rollout_ref.rollout
        arguments_of = (
            rollout.max_model_len,
            rollout.tensor_model_parallel_size,
            cfg.card.name,
            cfg.architecture.vocab_size,
        )
        if arguments_of not in parsed:
            parsed.add(arguments_of)
            arguments, asked = vllm_arguments(cfg, monkeypatch)
            asked_of_gpus |= set() if hardware == "cpu" else asked
            assert arguments.tensor_parallel_size == cfg.actor_rollout_ref.rollout.tensor_model_parallel_size
            assert arguments.enforce_eager == cfg.actor_rollout_ref.rollout.enforce_eager
            assert arguments.max_model_len >= cfg.data.max_prompt_length + cfg.data.max_response_length
    assert allowed > len(chosen) / 2
    # On GPUs vLLM is another version than the one here: its options are known by name alone.
    version, names = vllm_arguments_of_gpus.known()
    assert f"vllm=={version}" in (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    assert len(asked_of_gpus) > 10
    assert asked_of_gpus <= names


def test_the_list_of_vllms_options_reads_a_parsers_source():
    """As vLLM's own is written: groups, two names, a class whose fields become options."""
    text = "group.add_argument('--max-model-len', '-m', **k['x'])\nclass FrontendArgs:\n    chat_template: str = ''\n"
    assert vllm_arguments_of_gpus.options(text) == {"max-model-len", "chat-template"}


def vllm_arguments(cfg, monkeypatch):
    """What this vLLM's parser makes of the command line that verl's server builds, and the options in that line."""
    from types import SimpleNamespace

    from verl.workers.rollout.replica import RolloutMode
    from verl.workers.rollout.vllm_rollout import vllm_async_server

    class Server(vllm_async_server.vLLMHttpServer):
        async def run_server(self, args):
            self.arguments = args

    runtime = SimpleNamespace(get_job_id=lambda: "01", get_node_id=lambda: "0")
    monkeypatch.setattr(vllm_async_server.ray, "get_runtime_context", lambda: runtime)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    async def launch():
        refs = cfg.actor_rollout_ref
        server = Server(refs.rollout, refs.model, RolloutMode.HYBRID, [], 0, 0, 8, 1, "")
        await server.launch_server()
        return server.arguments

    build, lines = vllm_async_server.build_cli_args_from_config, []
    monkeypatch.setattr(
        vllm_async_server, "build_cli_args_from_config", lambda config: lines.append(build(config)) or lines[-1]
    )
    parsed = asyncio.run(launch())
    monkeypatch.undo()
    (line,) = lines
    return parsed, {each[2:].replace("_", "-").removeprefix("no-") for each in line if each.startswith("--")}


@pytest.mark.slow
def test_a_trackers_missing_key_or_package_is_one_line(monkeypatch, tmp_path):
    from verl_recipes.run.trackers import check_trackers

    def told(name, **environment):
        for key in ("WANDB_API_KEY", "SWANLAB_API_KEY", "WANDB_MODE", "SWANLAB_MODE"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        trackers = OmegaConf.load(CONFIGS / "tracker" / f"{name}.yaml")
        check_trackers(OmegaConf.create({"trackers": trackers, "run_dir": "runs/x"}).trackers)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("verl_recipes.run.trackers.find_spec", lambda name: name)
    monkeypatch.setattr("verl_recipes.run.trackers.server_answers", lambda address: True)
    for name in ("wandb", "swanlab"):
        with pytest.raises(UserError, match=f"tracker={name}: no key"):
            told(name)
        told(name, **{f"{name.upper()}_API_KEY": "x"})
        told(name, **{f"{name.upper()}_MODE": "offline"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n", encoding="utf-8")
    told("wandb")
    monkeypatch.setattr("verl_recipes.run.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracker=mlflow: the package is not installed"):
        told("mlflow")
