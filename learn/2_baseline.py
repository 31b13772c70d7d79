"""python learn/2_baseline.py [key=value ...]: what script 1 does, with a baseline: only better than average counts.

Subtract one number from all scores before they become weights:

    advantage = score - mean score of the batch

The expected gradient stays the same, because a constant times the gradient of log p averages to 0 over what the model
draws. Its noise shrinks: a response worse than average now becomes less likely, and an average one stays as it is,
instead of everything being pushed up. (The mean contains the sample's own score, so all advantages are smaller by a
256th; REINFORCE leave-one-out divides that out.)

What to look at: one line differs from script 1, `advantages = ...`.
"""

# %% What can be changed on the command line, and the model, its problems and an optimizer
import statistics

import common
import torch
from torch.nn.functional import cross_entropy

o = common.options("2_baseline", steps=12, prompts=32, n=8, lr=0.15, seed=0, reward="countdown", held_out=128)
model, tokenizer, train, test = common.load(o.seed)
optimizer = torch.optim.SGD(model.parameters(), lr=o.lr)


# %% The update
def update(samples: list[common.Sample], advantages: list[float]) -> float:
    """One step up the gradient of the mean over all tokens of advantage * log-probability. Returns its norm."""
    tokens = sum(len(sample.response) for sample in samples)
    for ids, mask, advantage in common.micro_batches(samples, advantages):
        log_p = -cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = -(advantage * log_p * mask).sum() / tokens
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


# %% The loop: draw responses, score them, make those better than average likelier
run = common.Run(o.name)
for step in range(o.steps):
    samples = common.sample(model, tokenizer, common.batch_of(train, step, o.prompts), o.n, o.reward)
    mean = statistics.fmean(sample.score for sample in samples)
    advantages = [sample.score - mean for sample in samples]
    run.step(step, samples, gradient_norm=update(samples, advantages))

# %% The held-out problems, and the curve
run.finish(model, tokenizer, test[: o.held_out])
