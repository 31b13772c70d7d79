"""The replay buffer of a run: verl's own, which also writes every sample with each component of its reward.

verl 0.9.1's trainer writes training samples without the reward's components, logs no component as a metric in training,
and looks for finished rollouts only every two seconds. The replay buffer is the documented place to change all three
(`trainer.v1.sampler.custom_sampler`): training and validation batches pass through its `sample`, and the metrics that
it returns are added to the trainer's.

One line of the files it writes, `samples/{train,validation}/<step>.jsonl`:

    {"step": 0, "prompt_id": "5d0c…", "prompt": "…", "response": "11+18=29,…", "ground_truth": {…},
     "data_source": "countdown/3_numbers", "extra_info": {"split": "test", "index": 0, …}, "response_tokens": 37,
     "truncated": false, "repeated": false, "score": 0.1, "reward_score": 0.1, "acc": 0.0, "format": 1.0,
     "reason": "wrong_value", "reason/no_answer": 0.0, …}

`score` is what was trained on, `reward_score` what the reward function returned (measure/batch.py).
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from transformers import AutoTokenizer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from reward_score.components import repetition
from verl_recipes.in_verl import dead_actors
from verl_recipes.in_verl.alarms import check_output, check_signal
from verl_recipes.in_verl.trainer_link import TrainerLink
from verl_recipes.measure.batch import component_metrics, scored
from verl_recipes.run.best import evaluations, is_enough
from verl_recipes.run.folder import RunFolder, append_line, as_lines, pack, write_whole

POLL_SECONDS = 0.05  # between two looks for finished rollouts, if there are few
POLL_SHARE = 0.1  # of the time at most may go into looking, as 8,192 keys take a good part of a second
POLL_MOST = 2.0  # seconds, verl's own interval
FIELDS = ["prompts", "responses", "reward_model", "data_source", "extra_info", "extra_fields", "rm_scores"]


def for_json(value: Any) -> Any:
    """A scalar or array of numpy's as Python's own, which JSON can hold; anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def as_float(value: Any) -> Any:
    """A number of Python's or numpy's, or a one-element tensor, as a float: verl's own reward managers mix them."""
    value = value.item() if isinstance(value, np.generic) else value
    return float(value) if isinstance(value, int | torch.Tensor) and not isinstance(value, bool) else value


def next_look(took: float) -> float:
    """Seconds until the next look for finished rollouts, after one that took so many.

    >>> next_look(0.001), next_look(0.05), next_look(1.0)
    (0.05, 0.45, 2.0)
    """
    return min(max(POLL_SECONDS, round(took * (1 / POLL_SHARE - 1), 6)), POLL_MOST)


class CountdownReplayBuffer(ReplayBuffer):
    """For verl's synchronous trainer. Its settings are `trainer.v1.sampler.sampler_kwargs` in configs/train.yaml."""

    tested = True  # since `patience` was asked last

    def __init__(self, *args: Any, sampler_kwargs: Mapping[str, Any], **kwargs: Any) -> None:
        groups, self.link = sampler_kwargs["filter_groups"], TrainerLink(kwargs)
        super().__init__(
            *args,
            sampler_kwargs=sampler_kwargs,
            poll_interval=POLL_SECONDS,
            # DAPO's dynamic sampling, which verl's trainer_base.py configures for its own replay buffers only.
            filter_groups_metric=groups["metric"] if groups["enable"] else None,
            train_batch_size=sampler_kwargs["train_batch_size"],
            gen_batch_size=1,
            max_inflight_gen_batches=groups["max_inflight_gen_batches"],
            sync_refill_failed_groups=self.link.refills_failed_groups(),
            **kwargs,
        )
        dead_actors.watch()  # verl's trainer makes its replay buffer before its actors
        self.run = RunFolder(Path(sampler_kwargs["samples_dir"]).parent)
        trusted = self.link.trusts_remote_code()
        self.tokenizer = AutoTokenizer.from_pretrained(sampler_kwargs["tokenizer"], trust_remote_code=trusted)
        self.rows: dict[tuple[str, int], list[dict[str, Any]]] = {}  # of the present step
        self.history: dict[int, dict[str, float]] = {}  # metrics of the training steps
        self.without_signal = 0  # groups that dynamic sampling dropped in this step

    def _sync_metadata_from_transfer_queue(self) -> None:
        """One look of verl's at every key; the next follows after nine times as long."""
        began = time.monotonic()
        super()._sync_metadata_from_transfer_queue()
        self.poll_interval = next_look(time.monotonic() - began)

    def _evict_terminal_groups(self, *args: Any, **kwargs: Any) -> Any:
        """verl's, which drops groups and generates others, without end: it ignores `max_num_gen_batches`."""
        found = super()._evict_terminal_groups(*args, **kwargs)
        self.without_signal += found[2]
        most = self.sampler_kwargs["filter_groups"]["max_num_gen_batches"] * self.train_batch_size
        check_signal(self.without_signal, most)
        return found

    def _materialize_batch(self, partition_id: str, uids: list[str], snapshot: Mapping[str, Any]) -> KVBatchMeta:
        """verl's, with responses in the order of their prompts instead of that in which they ended.

        A step's mini-batches are slices of the batch: the first would hold the short responses and the last the long
        ones, and groups would be divided.
        """
        place = {uid: number for number, uid in enumerate(self.prompt_global_steps[partition_id])}
        ordered = dict(sorted(snapshot.items(), key=lambda item: place.get(item[0].split("_")[0], len(place))))
        return super()._materialize_batch(partition_id, uids, ordered)

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, float]]:
        split = "validation" if partition_id == "val" else partition_id
        self.note("generating", split, global_steps)
        self.end_if_asked(split)
        self.link.shield_trackers()
        if self.trainer_mode == "sync":
            self.link.wait_for_rollouts()
        self.without_signal = 0
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        self.note("generated", split, global_steps)
        rows = self.read(batch, global_steps)
        self.write(rows, split, global_steps)
        shares = component_metrics(rows)
        if split == "train":
            # The share of responses that failed; verl trains on nothing in their place.
            own = {"reward/missing": 1 - len(rows) / self.link.responses_to(batch_size)}
            if self.without_signal:  # dynamic sampling left these groups out of the batch
                groups = len({row["prompt_id"] for row in rows}) + self.without_signal
                own["reward/groups_without_signal"] = self.without_signal / groups
            shares |= own
            self.link.learn(rows)
            # With topology=split a step has several batches, and the last one has the longest responses.
            self.history[global_steps] = component_metrics(self.rows[split, global_steps]) | own
            alarm = self.sampler_kwargs["alarm"]
            self.history.pop(global_steps - alarm["steps"], None)  # no alarm looks further back
            check_output(self.history, alarm["limits"], alarm["steps"], Path(self.sampler_kwargs["checkpoints_dir"]))
            if self.run.stop.exists():
                self.link.save_this_step()
        return batch, metrics | shares

    def end_if_asked(self, split: str) -> None:
        """End verl after a step that is saved: if a scheduler asked for it (run/supervise.py), or by `patience`."""
        if self.run.stop.exists() and self.link.is_saved(split):
            self.link.stop("by SIGTERM, after a checkpoint")
        patience = self.sampler_kwargs["patience"]
        asks, self.tested = self.tested and split == "train", split != "train"  # reading all metrics takes a while
        if asks and patience and is_enough(evaluations(self.run), patience):
            self.link.stop(f"early: {patience} tests in a row brought nothing better")

    def read(self, batch: KVBatchMeta, step: int) -> list[dict[str, Any]]:
        """The samples of a batch, one row each."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
        columns = zip(batch.keys, *(data[name] for name in FIELDS), strict=True)
        return [
            (own := {"step": step, "prompt_id": key.split("_")[0]})
            | self.row(dict(zip(FIELDS, values, strict=True)))
            | own
            for key, *values in columns
        ]

    def row(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """One sample, from its FIELDS in TransferQueue: token ids, the data's columns, and the score of each token."""
        own = {name: getattr(value, "data", value) for name, value in fields.items()}  # not tensordict's wrappers
        text = self.tokenizer.decode(own["responses"], skip_special_tokens=True)
        verdict = own["extra_fields"].get("reward_extra_info", {})
        columns = {
            "prompt": self.tokenizer.decode(own["prompts"], skip_special_tokens=True),
            "response": text,
            "ground_truth": own["reward_model"]["ground_truth"],
            "data_source": own["data_source"],
            "extra_info": own["extra_info"],
            "response_tokens": len(own["responses"]),
            "truncated": len(own["responses"]) >= self.sampler_kwargs["response_length"],
            "repeated": repetition(text) == 1.0,
        }
        verdict = {name: as_float(value) for name, value in verdict.items()}
        # The reward's keys come last, and replace none of these.
        return columns | scored(verdict, float(own["rm_scores"].sum())) | columns

    def write(self, rows: list[dict[str, Any]], split: str, step: int) -> None:
        """Add rows to the file of their step. Only training's are kept, as an evaluation may have gigabytes."""
        path, text = self.run.samples_of(split, step), as_lines(rows, default=for_json)
        if (split, step) in self.rows:  # a further batch
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        else:
            write_whole(path, text)
        everything = self.rows.get((split, step), []) + rows if split == "train" else []
        for other in self.rows.keys() - {(split, step)}:  # earlier steps are finished
            if other[0] == "train":
                pack(self.run.samples_of(*other))
        self.rows = {(split, step): everything}

    def note(self, event: str, split: str, step: int) -> None:
        """Append an event to `events.jsonl`, from which the command shows the progress."""
        append_line(self.run.events, {"time": time.time(), "event": event, "split": split, "step": step})


class CountdownReplayBufferAsync(CountdownReplayBuffer, ReplayBufferAsync):
    """For verl's asynchronous trainers (configs/topology): `super()` above is then ReplayBufferAsync."""
