"""python benchmarks/bare_loop.py [key=value ...]: the tiny run as a bare PyTorch loop, the limit for verl.

GRPO (arXiv 2402.03300) with the settings of configs/recipe/tiny.yaml: the same model, prompts, samples, lengths,
optimizer and reward, in one process without Ray, vLLM, FSDP or checkpoints. Prompts are prefilled once and their cache
is repeated for the group. Finished responses leave the batch. Log-probabilities are computed in micro-batches of
similar length. It prints a line for each step, and at the end the median seconds of a step and the held-out mean@8.

Keys: steps, seed, lr, optimizer (a class of torch.optim), reward (countdown or random), prompts, n.
"""

import json
import statistics
import sys
import time
from typing import Any

import torch
from datasets import load_dataset
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from data_prep.cli import compose
from reward_score import countdown, random_control
from verl_recipes.settings import configuration  # noqa: F401  (its resolvers)
from verl_recipes.settings.sizes import MICRO_BATCH


def generate(model: Any, prompts: list[list[int]], n: int, most: int, pad: int) -> list[list[int]]:
    """n responses to each prompt at temperature 1, of at most `most` tokens, in the order of the prompts."""
    end, width = model.config.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
    cache.batch_repeat_interleave(n)
    logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    position = mask.sum(1, keepdim=True)
    alive = torch.arange(len(prompts) * n)
    responses: list[list[int]] = [[] for _ in alive]
    for _ in range(most):
        token = torch.multinomial(logits[:, -1].softmax(-1), 1)
        for index, value in zip(alive.tolist(), token[:, 0].tolist(), strict=True):
            responses[index].append(value)
        going = (token[:, 0] != end).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < 0.8 * len(alive) or len(going) < 16:
            cache.batch_select_indices(going)
            alive, token, mask, position = alive[going], token[going], mask[going], position[going]
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits = model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        position = position + 1
    return [cut(response, end) for response in responses]


def cut(response: list[int], end: int) -> list[int]:
    return response[: response.index(end) + 1] if end in response else response


def update(model: Any, optimizer: Any, rows: list[tuple[list[int], list[int], float]], pad: int, clip: float) -> float:
    """An on-policy update with rows of (prompt, response, advantage), a mean over all tokens. Returns the norm."""
    total = sum(len(response) for _, response, _ in rows)
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    for start in range(0, len(rows), MICRO_BATCH):
        batch = rows[start : start + MICRO_BATCH]
        width = max(len(prompt) + len(response) for prompt, response, _ in batch)
        ids = torch.full((len(batch), width), pad)
        weight = torch.zeros(len(batch), width)
        for index, (prompt, response, advantage) in enumerate(batch):
            whole = prompt + response
            ids[index, : len(whole)] = torch.tensor(whole)
            weight[index, len(prompt) : len(whole)] = advantage
        logits = model(ids).logits[:, :-1]
        negative_log_probability = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        ((weight[:, 1:] * negative_log_probability).sum() / total).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    optimizer.step()
    optimizer.zero_grad()
    return norm


def main(arguments: list[str]) -> None:
    cfg = compose("train", [])
    actor = cfg.actor_rollout_ref.actor
    options = OmegaConf.merge(
        {
            "steps": cfg.trainer.total_training_steps,
            "seed": 0,
            "lr": actor.optim.lr,
            "optimizer": actor.optim.optimizer,
            "reward": "countdown",
            "prompts": cfg.data.train_batch_size,
            "n": cfg.actor_rollout_ref.rollout.n,
        },
        OmegaConf.from_dotlist(arguments),
    )
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(cfg.actor_rollout_ref.model.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(cfg.actor_rollout_ref.model.path)
    optimizer = getattr(torch.optim, options.optimizer)(model.parameters(), lr=options.lr, weight_decay=0.0)
    compute_score = (random_control if options.reward == "random" else countdown).compute_score
    data = load_dataset("parquet", data_files=cfg.data.train_files, split="train").shuffle(options.seed)

    def encode(messages: list[dict[str, str]]) -> list[int]:
        template = cfg.actor_rollout_ref.model.custom_chat_template
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )

    seconds = []
    for step in range(options.steps):
        began = time.perf_counter()
        problems = data.select(range(step * options.prompts, (step + 1) * options.prompts)).to_list()
        prompts = [encode(row["prompt"]) for row in problems]
        with torch.inference_mode():
            responses = generate(model, prompts, options.n, cfg.data.max_response_length, tokenizer.pad_token_id)
        generated = time.perf_counter()
        rows, verdicts = [], []
        for index, (row, prompt) in enumerate(zip(problems, prompts, strict=True)):
            group = responses[index * options.n : (index + 1) * options.n]
            texts = tokenizer.batch_decode(group, skip_special_tokens=True)
            scored = [compute_score(row["data_source"], text, row["reward_model"]["ground_truth"]) for text in texts]
            scores = torch.tensor([verdict["score"] for verdict in scored])
            advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
            rows += zip([prompt] * options.n, group, advantages.tolist(), strict=True)
            verdicts += scored
        norm = update(model, optimizer, rows, tokenizer.pad_token_id, actor.optim.clip_grad)
        seconds.append(time.perf_counter() - began)
        figures = {
            "step": step + 1,
            "acc": round(statistics.mean(verdict["acc"] for verdict in verdicts), 3),
            "tokens": round(statistics.mean(map(len, responses)), 1),
            "gradient_norm": round(norm, 4),
            "generation_s": round(generated - began, 2),
            "step_s": round(seconds[-1], 2),
        }
        print(json.dumps(figures), flush=True)
    test = load_dataset("parquet", data_files=cfg.data.val_files, split="train").to_list()
    prompts = [encode(row["prompt"]) for row in test]
    with torch.inference_mode():
        responses = generate(model, prompts, cfg.eval_n, cfg.data.max_response_length, tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    right = [
        countdown.compute_score(row["data_source"], text, row["reward_model"]["ground_truth"])["acc"]
        for row, text in zip((row for row in test for _ in range(cfg.eval_n)), texts, strict=True)
    ]
    print(json.dumps({"median_step_s": round(statistics.median(seconds), 2), "held_out": statistics.mean(right)}))


if __name__ == "__main__":
    main(sys.argv[1:])
