"""Compares planned with measured memory: verl's own CPU engine trains one mini-batch of the tiny model in this process.

    python benchmarks/plan_memory.py        writes benchmarks/plan_memory.md

The measurement sums up all allocations of torch's CPU allocator over time, as torch.profiler records them; the resident
set of a process would be mostly Python and libraries. Both sides have AdamW, because of its moments, and the same
micro-batches, of the greatest length.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

os.environ |= {"VERL_PLATFORM": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["MASTER_PORT"] = str(probe.getsockname()[1])

import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine import EngineRegistry

from data_prep.cli import compose
from verl_recipes.planning.memory import passes
from verl_recipes.planning.tracking import cached
from verl_recipes.settings.configuration import longest

MIB = 2**20
SEQUENCES = 32  # two micro-batches of the CPU engine


def batch(cfg: Any, vocabulary: int) -> TensorDict:
    """Sequences of the greatest length, as verl's trainer hands them to the engine."""
    total, response = longest(cfg), cfg.data.max_response_length
    ids = torch.randint(0, vocabulary, (SEQUENCES, total))
    rows = {
        "input_ids": list(ids),
        "position_ids": [torch.arange(total)] * SEQUENCES,
        "prompts": [row[: total - response] for row in ids],
        "responses": [row[total - response :] for row in ids],
        "response_mask": [torch.ones(response, dtype=torch.int64)] * SEQUENCES,
        "loss_mask": [torch.ones(response, dtype=torch.int64)] * SEQUENCES,
    }
    nested = {name: torch.nested.as_nested_tensor(each, layout=torch.jagged) for name, each in rows.items()}
    data = TensorDict(nested, batch_size=SEQUENCES)
    settings = {"use_remove_padding": False, "temperature": 1.0, "calculate_entropy": False, "pad_token_id": 0}
    settings["use_fused_kernels"] = cfg.actor_rollout_ref.model.use_fused_kernels
    tu.assign_non_tensor(data, **settings, global_batch_size=SEQUENCES, use_dynamic_bsz=False)
    return data


def peak(profiler: Any) -> int:
    """Most bytes that torch's CPU allocator held at once, of those allocated while the profiler ran."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    torch.set_num_threads(1)
    cfg = compose("train", ["recipe=tiny", "gpus=1", "actor_rollout_ref.actor.optim.optimizer=AdamW"])
    planned = cached(passes(cfg)["actor"])  # before there is a process group that is more than fake
    initialize_global_process_group_ray()
    actor = cfg.actor_rollout_ref.actor
    model = omega_conf_to_dataclass(cfg.actor_rollout_ref.model)
    optimizer = omega_conf_to_dataclass(actor.optim)
    optimizer.total_training_steps = 10
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=omega_conf_to_dataclass(actor.fsdp_config),
        optimizer_config=optimizer,
        checkpoint_config=omega_conf_to_dataclass(actor.checkpoint),
    )
    engine.initialize()

    def loss(model_output: Any, data: Any, dp_group: Any) -> Any:
        return model_output["log_probs"].values().mean(), {}

    config = json.loads(passes(cfg)["actor"].shape)
    data = batch(cfg, config["vocab_size"])

    def update() -> None:
        with engine.train_mode():
            engine.forward_backward_batch(data.clone(), loss)
            engine.optimizer_step()

    update()  # Adam's moments are made by the first step
    resident = sum(
        t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes
        for t in [*engine.module.parameters(), *(v for s in engine.optimizer.state.values() for v in s.values())]
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    at_rest = planned["parameters"] + planned["optimizer"]
    rows = [
        ("parameters and optimizer, held", at_rest, resident),
        ("gradients, activations, logits, at the peak of an update", sum(planned.values()) - at_rest, peak(profiler)),
    ]
    rows.append(("sum", *map(sum, zip(*(row[1:] for row in rows), strict=True))))
    lines = ["| tiny model, one rank, MiB | plan | measured | difference |", "| --- | --- | --- | --- |"]
    for what, plan, seen in rows:
        lines.append(f"| {what} | {plan / MIB:.1f} | {seen / MIB:.1f} | {plan / seen - 1:+.0%} |")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "plan_memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
