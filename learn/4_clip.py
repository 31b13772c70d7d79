"""python learn/4_clip.py [key=value ...]: what script 3 does, with several updates a batch and a clip.

Drawing responses is the expensive half of a step, so a batch should serve several updates. But after the first one the
model is no longer the one that drew the responses: its gradient needs the ratio

    ratio = p(token now) / p(token when it was drawn)

as a weight (importance sampling). Where the ratio has left 1 - clip to 1 + clip in the direction that the advantage
asks for, the token has had its share, and the clip (PPO, arXiv 1707.06347) takes its gradient away:

    -min(ratio * advantage, clamp(ratio, 1 - clip, 1 + clip) * advantage)

In the first update all ratios are 1, and this is script 3's gradient. What to look at: `clipped`, the share of tokens
without a gradient, and how much faster it learns from the same number of responses.

With `updates=1` this is the tiny run of configs/recipe/tiny.yaml without any framework, so it is also the bare
loop of benchmarks/beside.py: one process without Ray, vLLM, FSDP or checkpoints, the limit for verl.
"""

# %% What can be changed on the command line, and the model, its problems and an optimizer
import common
import torch
from torch.nn.functional import cross_entropy

o = common.options(
    "4_clip",
    steps=12,
    prompts=32,
    n=8,  # responses to each
    lr=0.15,
    seed=0,
    reward="countdown",
    held_out=128,
    epochs=1,  # how often a step's responses are used
    updates=4,  # into how many parts they are cut
    clip=0.2,
    optimizer="SGD",
)
model, tokenizer, train, test = common.load(o.seed)
optimizer = getattr(torch.optim, o.optimizer)(model.parameters(), lr=o.lr, weight_decay=0.0)


# %% The update
def update(samples: list[common.Sample], advantages: list[float]) -> tuple[float, float]:
    """One step up the gradient of the clipped objective, a mean over tokens. Returns its norm, the share clipped."""
    tokens, clipped = sum(len(sample.response) for sample in samples), 0.0
    drawn_with = [sample.log_probabilities for sample in samples]
    for ids, mask, advantage, old_log_p in common.micro_batches(samples, advantages, drawn_with):
        log_p = -cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        ratio = torch.exp(log_p - old_log_p)
        plain, bounded = ratio * advantage, ratio.clamp(1 - o.clip, 1 + o.clip) * advantage
        loss = -(torch.min(plain, bounded) * mask).sum() / tokens
        loss.backward()
        clipped += float(((bounded < plain) * mask).sum()) / tokens
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm), clipped


# %% The loop: draw responses, score them, make those better than their group likelier, in several updates
run = common.Run(o.name)
for step in range(o.steps):
    samples = common.sample(model, tokenizer, common.batch_of(train, step, o.prompts), o.n, o.reward)
    scores = torch.tensor([sample.score for sample in samples]).view(o.prompts, o.n)  # a row is a group
    deviation = scores.std(1, keepdim=True)
    advantages = ((scores - scores.mean(1, keepdim=True)) / (deviation + 1e-6)).flatten().tolist()
    size = len(samples) // o.updates
    parts = [slice(start, start + size) for start in range(0, len(samples), size)]
    norms, clipped = zip(*(update(samples[part], advantages[part]) for part in parts * o.epochs), strict=True)
    run.step(step, samples, gradient_norm=max(norms), clipped=sum(clipped) / len(clipped))

# %% The held-out problems, and the curve
run.finish(model, tokenizer, test[: o.held_out])
