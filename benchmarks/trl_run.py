"""The tiny run in TRL's GRPOTrainer, for a comparison: same model, prompts, samples, lengths, optimizer and reward.

TRL needs other packages than verl, so it has an environment of its own:
  python -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 transformers==5.9.0 trl==1.16.0 omegaconf
  .venv-trl/bin/python benchmarks/trl_run.py runs/tiny-seed0 [steps]

The settings come from a run folder's config.yaml. It prints a line for each step, and at the end the median seconds.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from reward_score import countdown  # noqa: E402

OPTIMIZERS = {"AdamW": "adamw_torch", "SGD": "sgd"}  # torch's name and the Trainer's


class Lines(TrainerCallback):
    """Scores completions, prints a line a step, and keeps the seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.right: list[float] = []  # of the step

    def rewards(
        self, completions: list[str], data_source: list[str], reward_model: list[dict[str, Any]], **_: Any
    ) -> list[float]:
        """One score a completion, as verl gets it."""
        scored = [
            countdown.compute_score(source, text, model["ground_truth"])
            for source, text, model in zip(data_source, completions, reward_model, strict=True)
        ]
        self.right += [verdict["acc"] for verdict in scored]
        return [verdict["score"] for verdict in scored]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            self.seconds.append(time.time() - self.began)
            line = {
                "step": state.global_step,
                "acc": round(statistics.fmean(self.right), 3),
                "tokens": round(logs["completions/mean_length"], 1),
                "step_s": round(self.seconds[-1], 2),
            }
            print(json.dumps(line), flush=True)
            self.right.clear()


def main(run_dir: str, steps: str = "30") -> None:
    cfg: Any = OmegaConf.load(Path(run_dir) / "config.yaml")
    model_path, template = cfg.actor_rollout_ref.model.path, cfg.actor_rollout_ref.model.custom_chat_template
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data = load_dataset("parquet", data_files=str(cfg.data.train_files), split="train").map(
        lambda row: {
            "prompt": tokenizer.apply_chat_template(
                row["prompt"], chat_template=template, add_generation_prompt=True, tokenize=False
            )
        }
    )
    n, optim, lines = cfg.actor_rollout_ref.rollout.n, cfg.actor_rollout_ref.actor.optim, Lines()
    samples = cfg.data.train_batch_size * n
    settings = GRPOConfig(
        output_dir=str(ROOT / "runs" / "trl"),
        per_device_train_batch_size=64,  # four micro-batches
        gradient_accumulation_steps=samples // 64,
        num_generations=n,
        max_completion_length=cfg.data.max_response_length,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",  # the mean over all tokens of the batch
        scale_rewards="group",
        learning_rate=optim.lr,
        lr_scheduler_type="constant",
        optim=OPTIMIZERS[optim.optimizer],
        weight_decay=0.0,
        max_grad_norm=optim.clip_grad,
        max_steps=int(steps),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=cfg.seed if "seed" in cfg else 0,
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    GRPOTrainer(
        model, lines.rewards, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[lines]
    ).train()
    print(json.dumps({"median_step_s": round(statistics.median(lines.seconds), 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
