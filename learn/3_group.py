"""python learn/3_group.py [key=value ...]: what script 2 does, with the group as the baseline: GRPO's advantage.

Problems differ. A right answer to an easy one is nothing special, a right answer to a hard one is. So compare a
response with the other responses to the same prompt, its group, instead of the whole batch:

    advantage = (score - mean of the group) / (standard deviation of the group + 1e-6)

That is the "group relative" of GRPO (DeepSeekMath, arXiv 2402.03300). PPO learns a second network, the critic, to guess
the mean; here n responses to a prompt measure it. The division makes a lone right answer among wrong ones weigh more
than one of many. It also makes the gradient larger, as scores deviate by less than 1. A group whose scores are all
equal has the advantage 0, and teaches nothing.

What to look at: how much faster it learns at the same learning rate, and `groups_without_signal`. With `divide=0` the
group is only the baseline, which shows how much of it the division does.
"""

# %% What can be changed on the command line, and the model, its problems and an optimizer
import common
import torch
from torch.nn.functional import cross_entropy

o = common.options("3_group", steps=12, prompts=32, n=8, lr=0.15, seed=0, reward="countdown", held_out=128, divide=1)
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


# %% The loop: draw responses, score them, make those better than their group likelier
run = common.Run(o.name)
for step in range(o.steps):
    samples = common.sample(model, tokenizer, common.batch_of(train, step, o.prompts), o.n, o.reward)
    scores = torch.tensor([sample.score for sample in samples]).view(o.prompts, o.n)  # a row is a group
    deviation = scores.std(1, keepdim=True)
    centred = scores - scores.mean(1, keepdim=True)
    advantages = (centred / (deviation + 1e-6) if o.divide else centred).flatten().tolist()
    silent = float((deviation == 0).float().mean())
    run.step(step, samples, gradient_norm=update(samples, advantages), groups_without_signal=silent)

# %% The held-out problems, and the curve
run.finish(model, tokenizer, test[: o.held_out])
