"""What Hydra's groups cannot express: arithmetic between them, and which of them do not go together."""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep import SHIPPED
from data_prep.cli import UserError
from data_prep.help import did_you_mean

STALENESS = "COUNTDOWN_ZERO_STALENESS"  # environment variable: of the run, for the guard of in_verl/agreement.py
KEPT = "COUNTDOWN_ZERO_KEPT"  # environment variable: what kept_of says of the run, for the same guard
PYTHON = "COUNTDOWN_ZERO_PYTHON"  # environment variable: the executable that asks cpu/forkserver.py for a process
MICRO_BATCH = 32  # sequences of a micro-batch on a CPU: more would not be faster on two cores, but hold more padding

# What verl 0.9.1 registers (verl/trainer/ppo/core_algos.py), and gmpo of in_verl/losses.py.
ESTIMATORS = (
    "gae", "gdpo", "gpg", "grpo", "grpo_passk", "grpo_vectorized", "opo", "optimal_token_baseline",
    "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "rloo", "rloo_vectorized",
    "tir_optimal_token_baseline",
)  # fmt: skip
LOSSES = (
    "bypass_mode", "cispo", "clip_cov", "dppo_kl", "dppo_tv", "dro", "geo_mean", "gmpo", "gpg", "gspo", "kl_cov",
    "sapo", "vanilla",
)  # fmt: skip


def package_dir(name: str) -> str:
    """The folder of a package, found without an import: verl's takes ten seconds."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"{name} is not installed here; bash launch/setup.sh (GPUs: STACK=gpu) installs it")
    return str(Path(spec.origin).parent)


def user_cache(name: str) -> Path:
    """The folder of this user's for what is kept from run to run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "countdown-zero" / name


@cache
def asset(name: str) -> str:
    """The path of a shipped asset. It is relative in a checkout, so that a run's config.yaml names no machine."""
    here = Path("assets") / name
    return str(here if here.exists() else SHIPPED / here)


def batch_for_ranks(prompts: int, updates: int, n: int, nodes: int, ranks_per_node: int) -> int:
    """The batch nearest to `prompts` that splits into `updates` mini-batches which the ranks can share evenly.

    `n` is the number of responses to each prompt.

    >>> batch_for_ranks(16, 1, 8, 1, 3), batch_for_ranks(256, 4, 1, 1, 3), batch_for_ranks(24, 1, 8, 1, 3)
    (15, 252, 24)
    """
    ranks = max(int(nodes * ranks_per_node), 1)  # the schema makes 2 of 2.0 later
    step = int(updates) * (ranks // gcd(ranks, int(n)))
    return max(round(prompts / step), 1) * step


def from_count(gpus: int, nodes: int, values: dict[int, Any]) -> Any:
    """The value for so many machines with so many GPUs each; the keys of `values` are least numbers of GPUs in all.

    >>> from_count(1, 1, {1: "few", 3: "many"}), from_count(2, 2, {1: "few", 3: "many"})
    ('few', 'many')
    """
    return values[max((least for least in values if least <= gpus * nodes), default=min(values))]


def attention() -> str:
    """The attention of packed sequences: flash-attn's if that is installed, else torch's (in_verl/attention.py)."""
    return "flash_attention_2" if find_spec("flash_attn") else "torch_varlen"


def ray_cpus(training: int, generating: int, nodes_alone: int, storage_units: int) -> int:
    """The logical CPUs of Ray on a machine with these GPUs, however many it has: verl waits for them.

    verl 0.9.1 asks for three a GPU, TransferQueue for one a storage unit and one for its controller. Eight more are for
    actors that start: each holds one until it runs.

    Args:
        training, generating: GPUs. They are the same ones unless `nodes_alone`, on how many nodes some only generate.
        storage_units: of TransferQueue.

    >>> ray_cpus(1, 1, 0, 8), ray_cpus(6, 2, 1, 8)
    (20, 41)
    """
    return 3 * (training + generating * bool(nodes_alone)) + storage_units + 1 + 8


RESOLVERS: dict[str, Callable[..., Any]] = {
    "asset": asset,
    "attention": attention,
    "package_dir": package_dir,
    "batch_for_ranks": batch_for_ranks,
    "add": lambda *terms: sum(terms),
    "multiply": lambda a, b: float(f"{a * b:.12g}"),  # 1e-05, not 9.99…e-06
    "divide": lambda a, b: a // b,
    "subtract": lambda a, b: a - b,
    "gcd": lambda *numbers: gcd(*map(int, numbers)),
    "ray_cpus": ray_cpus,
    "from_count": from_count,
    "loop_workers": lambda device: 1 if device == "cpu" else 8,  # 8: verl's
    # A dictionary of Python's would do until verl calls OmegaConf.resolve.
    "template_options": lambda prompt: prompt.get("template_options", OmegaConf.create()),
    "generating_gpus": lambda gpus: max(1, gpus // 4),
}
for name, function in RESOLVERS.items():
    OmegaConf.register_new_resolver(name, function, replace=True)


def is_split(cfg: DictConfig) -> bool:
    """Whether generation has GPUs of its own."""
    return cfg.trainer.v1.trainer_mode == "separate_async"


def gpus_of(cfg: DictConfig) -> tuple[int, int]:
    """How many GPUs train, and how many only generate."""
    trainer, rollout = cfg.trainer, cfg.actor_rollout_ref.rollout
    return trainer.nnodes * trainer.n_gpus_per_node, rollout.nnodes * rollout.n_gpus_per_node if is_split(cfg) else 0


def needs_reference(cfg: DictConfig) -> bool:
    """Whether the run uses a KL to the model before training."""
    return bool(cfg.algorithm.use_kl_in_reward or cfg.actor_rollout_ref.actor.use_kl_loss)


def kept_of(top_p: float, top_k: int) -> float:
    """The share of the probability that sampling keeps at least; 0 with top_k, where it is not known."""
    return 0.0 if top_k > 0 else float(top_p)


def longest(cfg: DictConfig) -> int:
    """Tokens of the longest sequence: prompt and response."""
    return cfg.data.max_prompt_length + cfg.data.max_response_length


def check_ranks(cfg: DictConfig) -> None:
    """Raise UserError if the topology leaves no GPU for training, none for generation, or parts of an engine."""
    rollout = cfg.actor_rollout_ref.rollout
    if is_split(cfg) and min(cfg.trainer.n_gpus_per_node, rollout.n_gpus_per_node) < 1:
        raise UserError(
            f"topology=split takes a GPU for generation, so one {cfg.card.name} has none left to train: "
            "take gpus=2 or more, or topology=colocated"
        )
    if cfg.trainer.n_gpus_per_node < 1:
        raise UserError(
            f"trainer.n_gpus_per_node={cfg.trainer.n_gpus_per_node}: no rank is left to train; leave it out, as gpus= "
            "sets it, on a CPU too"
        )
    # An engine takes some GPUs of one machine, or all of several (verl's replica.py).
    generating, parallel = rollout.n_gpus_per_node, rollout.tensor_model_parallel_size
    if generating % parallel and (parallel % generating or generating * (rollout.nnodes or 1) % parallel):
        raise UserError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel} does not divide {generating} GPUs: "
            "choose a divisor"
        )


def check_critic(cfg: DictConfig) -> None:
    """Raise UserError for a critic that transformers 5.9 does not have."""
    if cfg.algorithm.adv_estimator == "gae" and (cfg.get("architecture") or {}).get("model_type") == "gemma3_text":
        raise UserError("transformers 5.9 has no critic of Gemma 3: take a recipe without one, as recipe=tinyzero_grpo")


def check_staleness(cfg: DictConfig) -> None:
    """Raise UserError if weights of earlier steps are to answer where each batch waits for those of its own."""
    if cfg.get("staleness") and cfg.trainer.v1.sampler.max_off_policy_strategy != "wait":  # a run of old has no key
        where = "split_async" if is_split(cfg) else "colocated_async"
        raise UserError(f"staleness={cfg.staleness} has no effect with this topology: choose topology={where}")


def check_attention(cfg: DictConfig) -> None:
    """Raise UserError where sequences are divided among ranks by what only flash-attn's attention does."""
    actor, ref, model = cfg.actor_rollout_ref.actor, cfg.actor_rollout_ref.ref, cfg.actor_rollout_ref.model
    # The engine's key has a former name beside it, which verl copies into it.
    places = (actor, actor.fsdp_config, ref, ref.fsdp_config, cfg.critic.fsdp)
    ranks = max(each.ulysses_sequence_parallel_size for each in places)
    name = model.override_config.get("attn_implementation", "flash_attention_2")
    if ranks > 1 and not name.startswith("flash_attention"):
        raise UserError(
            f"ulysses_sequence_parallel_size={ranks} needs flash-attn, and attn_implementation is {name}: install it "
            "(docs/gpu.md), or leave the size at 1"
        )


def check_agents(cfg: DictConfig) -> None:
    """Raise UserError if nobody would score what verl's own agent loop answers, or if an agent would not be used."""
    agent = cfg.actor_rollout_ref.rollout.agent
    manager = str(agent.get("agent_loop_manager_class") or "")
    if not manager and cfg.reward.num_workers < 1:
        raise UserError("reward.num_workers=0: verl's own agent loop needs a worker to score: add reward.num_workers=1")
    if manager.endswith("BatchRollout") and agent.default_agent_loop not in ("single_turn_agent", "row_sampling"):
        raise UserError(
            f"actor_rollout_ref.rollout.agent.default_agent_loop={agent.default_agent_loop} needs verl's own manager: "
            "add actor_rollout_ref.rollout.agent.agent_loop_manager_class=null reward.num_workers=1"
        )


def check_names(cfg: DictConfig) -> None:
    """Raise UserError for an estimator or a loss that verl lacks, unless a library of the user's may register it.

    verl would look the name up after the first rollouts.
    """
    if os.environ.get("VERL_USE_EXTERNAL_MODULES") or cfg.actor_rollout_ref.model.external_lib:
        return
    names = {"algorithm.adv_estimator": ESTIMATORS, "actor_rollout_ref.actor.policy_loss.loss_mode": LOSSES}
    for key, known in names.items():
        if (name := OmegaConf.select(cfg, key)) not in known:
            raise UserError(f"{key}={name}: verl has none of that name{did_you_mean(name, known)}")


def check_algorithm(algorithm: DictConfig) -> None:
    """Raise UserError for what verl 0.9.1 has but its trainer (v1) cannot run, or would leave out without a word."""
    lacking = {"remax": "the reward of a greedy response", "optimal_token_baseline": "sum_pi_squared"}
    if missing := lacking.get(algorithm.adv_estimator.removeprefix("tir_")):
        raise UserError(
            f"algorithm.adv_estimator={algorithm.adv_estimator}: verl 0.9.1's trainer does not give it {missing}; "
            "choose another, such as rloo"
        )
    correction = algorithm.rollout_correction
    asked = correction.rollout_is or correction.rollout_rs or correction.loss_type != "ppo_clip"
    if correction.bypass_mode and asked:
        raise UserError(
            "correction= has no effect while algorithm.rollout_correction.bypass_mode=true takes the rollout's "
            "log-probabilities for the trainer's: set it to false"
        )


def check_log_probs(cfg: DictConfig) -> None:
    """Raise UserError if verl lacks the log-probabilities by which it is to correct; it would do nothing."""
    correction = cfg.algorithm.rollout_correction
    needed = correction.rollout_is or correction.rollout_rs or correction.bypass_mode
    if needed and not cfg.actor_rollout_ref.rollout.calculate_log_probs:
        raise UserError(
            "correction= and algorithm.rollout_correction.bypass_mode need the rollout's log-probabilities: set "
            "actor_rollout_ref.rollout.calculate_log_probs=true"
        )


def check_tests(cfg: DictConfig) -> None:
    """Raise UserError if what the tests decide would meet a step without a checkpoint."""
    patience = cfg.get("patience")
    asked = f"patience={patience}" if patience else "keep=best" if cfg.get("keep") == "best" else ""
    test, save = cfg.trainer.test_freq, cfg.trainer.save_freq
    if asked and (test < 1 or test % save):
        raise UserError(
            f"{asked} needs tests in training, at steps that are saved: trainer.test_freq={test} must be a multiple of "
            f"trainer.save_freq={save}"
        )
    if asked and test >= cfg.trainer.total_training_steps:
        raise UserError(
            f"{asked} needs several tests: with trainer.test_freq={test} only the model of the last step is tested"
        )


def check_choice(cfg: DictConfig) -> None:
    """Raise UserError if the numbers of recipe, model, hardware and topology do not go together."""
    check_ranks(cfg)
    check_staleness(cfg)
    check_critic(cfg)
    check_tests(cfg)
    trainer, actor, rollout = cfg.trainer, cfg.actor_rollout_ref.actor, cfg.actor_rollout_ref.rollout
    ranks, split, name = trainer.nnodes * trainer.n_gpus_per_node, is_split(cfg), cfg.card.name
    if cfg.architecture and cfg.architecture.parameters > cfg.card.most_parameters:
        raise UserError(
            f"{cfg.actor_rollout_ref.model.path} has {cfg.architecture.parameters / 1e9:.1f} billion parameters, and "
            f"hardware of {cfg.gpus * cfg.nodes} x {name} takes {cfg.card.most_parameters / 1e9:g} at most; choose "
            "another model or hardware, or set card.most_parameters to try"
        )
    if cfg.architecture and cfg.architecture.num_attention_heads % rollout.tensor_model_parallel_size:
        heads = cfg.architecture.num_attention_heads
        raise UserError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size} does not "
            f"divide {heads} heads: choose a divisor"
        )
    mini, n = actor.ppo_mini_batch_size, rollout.n
    if cfg.data.train_batch_size % mini or mini * n % ranks:
        raise UserError(
            f"data.train_batch_size={cfg.data.train_batch_size} must be whole mini-batches, and {n} responses to each "
            f"of actor_rollout_ref.actor.ppo_mini_batch_size={mini} prompts must be shared evenly by {ranks} ranks: "
            "change prompts=, updates= or actor_rollout_ref.rollout.n"
        )
    check_names(cfg)
    check_algorithm(cfg.algorithm)
    check_log_probs(cfg)
    if str(cfg.reward.custom_reward_function.path).endswith("random_control") and cfg.reward.num_workers > 1:
        raise UserError(
            f"reward.num_workers={cfg.reward.num_workers}: the coins of reward=random need one worker, which counts "
            "equal responses: add reward.num_workers=1"
        )
    if n < 2 and cfg.algorithm.adv_estimator not in ("gae", "reinforce_plus_plus"):  # these have no groups
        raise UserError(
            f"algorithm.adv_estimator={cfg.algorithm.adv_estimator} compares responses: "
            "actor_rollout_ref.rollout.n must be 2 or more"
        )
    if cfg.actor_rollout_ref.model.lora_rank and needs_reference(cfg) and cfg.algorithm.adv_estimator == "gae":
        raise UserError(  # verl 0.9.1 leaves `no_lora_adapter`, meant for the reference, in the critic's batch
            "verl cannot train a critic beside a LoRA adapter whose base is the reference: set tuning=full, or leave "
            "the KL out (algorithm.use_kl_in_reward=false)"
        )
    offloads = actor.fsdp_config.param_offload or actor.fsdp_config.offload_policy
    on_cpu = "a CPU" if trainer.device == "cpu" else "offloaded weights" if offloads else ""
    if split and cfg.updates > 1 and on_cpu and not cfg.algorithm.rollout_correction.bypass_mode:
        raise UserError(  # verl's `tensor.cpu()` is no copy there
            f"verl cannot keep the weights of a step's beginning on {on_cpu}: with topology=split set "
            "algorithm.rollout_correction.bypass_mode=true, or updates=1"
            + (", or actor_rollout_ref.actor.fsdp_config.{param_offload,offload_policy}=false" if offloads else "")
        )
    check_attention(cfg)
    check_agents(cfg)
    if actor.use_dynamic_bsz and actor.ppo_max_token_len_per_gpu < longest(cfg):
        raise UserError(
            f"a prompt and response of {longest(cfg)} tokens do not fit a micro-batch: raise "
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu}"
        )
