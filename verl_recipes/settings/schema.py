"""The keys of a training run that are this project's own, and the most important ones of verl's.

Defaults are in configs/train.yaml and the groups. settings/configuration.py checks what depends on several keys.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from data_prep.cli import Checked, Count, Integer, Number, PathText, Positive, Seed, Share, Size, Text


def _one_component(name: str) -> str:
    if name in (".", "..") or "/" in name or "\0" in name or name != name.strip():
        raise ValueError("should be one name of a folder, without a slash or blanks around it; run_dir= takes a path")
    return name


def _with_model(folder: str) -> str:
    if not (Path(folder) / "model" / "config.json").is_file():
        raise ValueError("holds no model/; `python -m verl_recipes.warm_start` makes such a folder")
    return folder


Name = Annotated[Text, AfterValidator(_one_component)]
Dtype = Literal["float32", "fp32", "bfloat16", "bf16", "float16", "fp16"]
Price = Annotated[list[Positive], Field(min_length=2, max_length=2)] | Positive | None


class Plan(Checked):
    sweep: bool = Field(description="plan: a row for each card and number of cards")
    price: Price = Field(description="of a GPU-hour, a number or [low,high]; null: that of configs/facts/gpus.yaml")
    currency: Text = Field(description="of plan.price")
    response_tokens: Positive | None = Field(
        description="mean length of a response; null: a fixed share of data.max_response_length"
    )


class Curriculum(Checked):
    order: Literal["easy_to_hard", "balanced", "adaptive"] = Field(description="set by curriculum=NAME")
    steps: Count = Field(description="over which easy_to_hard goes from the easiest problems to the hardest")
    seed: Seed = Field(description="of the order")


class Data(Checked):
    train_files: list[PathText] | PathText = Field(description="parquet files with the training problems")
    val_files: list[PathText] | PathText = Field(description="parquet files with the test problems")
    curriculum: Curriculum | None = Field(None, description="the order of the problems; null: drawn from the seed")
    train_batch_size: Count = Field(description="prompts a step")
    val_batch_size: Count | None = Field(description="test problems generated at once; null: all")
    train_max_samples: Integer = Field(-1, description="rows of the training files that are used; -1: all")
    val_max_samples: Integer = Field(-1, description="rows of the test files that are used, with eval_n=1; -1: all")
    max_prompt_length: Count = Field(description="tokens")
    max_response_length: Count = Field(description="tokens")


class Optim(Checked):
    lr: Positive = Field(description="learning rate")


class Fsdp(Checked):
    model_dtype: Dtype | None = Field(None, description="of the weights that train")
    ulysses_sequence_parallel_size: Count = Field(1, description="GPUs that share one sequence; needs flash-attn")


class Checkpoint(Checked):
    save_contents: list[Text] = Field(description="what verl saves")
    load_contents: list[Text] = Field(description="what a resume loads")


class Critic(Checked):
    checkpoint: Checkpoint
    fsdp: Fsdp


class PolicyLoss(Checked):
    loss_mode: Text = Field(description="verl's, or gmpo (in_verl/losses.py)")


class Algorithm(Checked):
    adv_estimator: Text = Field(description="how verl computes advantages")


class Ranks(Checked):
    ulysses_sequence_parallel_size: Count = Field(1, description="former name of fsdp_config's")


class Actor(Ranks):
    optim: Optim
    fsdp_config: Fsdp
    ppo_mini_batch_size: Count = Field(description="prompts an update")
    ppo_max_token_len_per_gpu: Count = Field(description="tokens of a micro-batch")
    policy_loss: PolicyLoss
    checkpoint: Checkpoint


class Validation(Checked):
    n: Count = Field(description="samples a problem; set by eval_n=")
    temperature: Number = Field(ge=0, description="of the tests")


class Rollout(Checked):
    nnodes: Size = Field(description="machines with GPUs that only generate")
    n_gpus_per_node: Integer = Field(description="of these GPUs on each machine")
    val_kwargs: Validation
    n: Count = Field(description="responses to a prompt")
    temperature: Positive = Field(description="of sampling in training")
    top_p: Annotated[Share, Field(gt=0)] = Field(description="of sampling in training")
    tensor_model_parallel_size: Count = Field(description="GPUs that share one vLLM engine")
    dtype: Dtype = Field(description="of vLLM's weights")
    max_model_len: Count | None = Field(None, description="tokens of prompt and response, at most; null: their sum")


class Model(Checked):
    path: PathText | None = Field(None, description="of the model: a folder, or a name on the hub")
    lora_rank: Size = Field(0, description="0: all weights train")


class Models(Checked):
    model: Model
    actor: Actor
    ref: Ranks
    rollout: Rollout


class Alarm(Checked):
    steps: Count = Field(description="a run ends if a share reaches its limit at this many steps in a row")
    limits: dict[str, Share | None] = Field(description="shares of a batch, each null for never")


class SamplerKwargs(Checked):
    alarm: Alarm


class Sampler(Checked):
    sampler_kwargs: SamplerKwargs


class V1(Checked):
    sampler: Sampler


class Trainer(Checked):
    total_training_steps: Count = Field(description="steps of the run")
    total_epochs: Count = Field(description="passes over the data at most; the steps decide")
    max_actor_ckpt_to_keep: Integer | None = Field(description="the newest checkpoints that stay; null or 0: all")
    default_local_dir: PathText = Field(description="folder of the checkpoints")
    save_freq: Count = Field(description="steps between checkpoints")
    test_freq: Integer = Field(description="steps between evaluations; -1: before and after training alone")
    logger: list[Text] = Field(description="set by tracker=NAME")
    restarts: Size = Field(description="how often a run that stopped early goes on by itself")
    nnodes: Count = Field(description="machines")
    n_gpus_per_node: Size = Field(description="ranks that train on each machine")
    v1: V1


class Card(Checked):
    name: Text = Field(description="of configs/facts/gpus.yaml, or cpu")
    transfer: Text = Field(description="verl's checkpoint engine, which sends weights to GPUs that only generate")
    most_parameters: Positive = Field(description="of the largest model that this hardware takes")


class TrainKeys(Checked):
    name: Name = Field(description="of the run")
    run_dir: PathText = Field(description="its folder")
    seed: Seed = Field(description="of data order, sampling and initialisation")
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = Field(
        description="a run for each of these seeds, one after another, and one page for all; null: `seed` alone"
    )
    fresh: bool = Field(description="empty the run's folder first, instead of continuing the run")
    warm_start: Annotated[PathText, AfterValidator(_with_model)] | None = Field(
        description="folder of a warm start or of another run, whose model is trained instead of the base; null: none"
    )
    keep: Literal["last", "best"] = Field(
        description="best: beside the last checkpoints, that of the best test stays (trainer.test_freq)"
    )
    patience: Count | None = Field(
        description="end the run once this many tests in a row are no better than an earlier one; null: never"
    )
    eval_n: Count = Field(description="samples a problem in the evaluations before and after training")
    force: bool = Field(description="start although plan says that the run does not fit")
    prompts: Count = Field(description="prompts a step; rounded so that all ranks share them evenly")
    updates: Count = Field(description="mini-batches a step")
    staleness: Size = Field(
        description="steps that the policy may be ahead of the weights that began a response (topology=*_async)"
    )
    learning_rate: Positive = Field(description="of the actor if all weights train; tuning=lora takes ten times it")
    gpus: Count = Field(description="GPUs of each machine; ranks on a CPU")
    nodes: Count = Field(description="machines")
    card: Card
    data: Data
    actor_rollout_ref: Models
    algorithm: Algorithm
    critic: Critic
    trainer: Trainer
    plan: Plan

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.warm_start:
            self.actor_rollout_ref.model.path = str(Path(self.warm_start) / "model")
        if self.actor_rollout_ref.model.path is None:
            raise ValueError("actor_rollout_ref.model.path=null: name the model's folder, as model=local has none")
        return self
