"""python learn/1_reinforce.py [key=value ...]: REINFORCE, the whole of policy-gradient learning in one line.

A language model is a policy: given a prompt, it draws a response token by token, and it can tell the log-probability
of what it drew. A rule scores the response: 1 if the equation is right, 0.1 if it is only well formed, else 0. To make
good responses likelier, REINFORCE (Williams, 1992) goes up the gradient of

    score * log p(response)

averaged over responses that the model drew itself. That is an unbiased estimate of the gradient of the mean score: no
right answer is ever shown, and the score needs no derivative.

What to look at: it learns, and slowly. Every score is 0 or more, so whatever was drawn becomes likelier, a wrong
response too, and a right one only by more. Most of that cancels out over many samples; the rest is noise.
"""

# %% What can be changed on the command line, and the model, its problems and an optimizer
import common
import torch
from torch.nn.functional import cross_entropy

o = common.options("1_reinforce", steps=12, prompts=32, n=8, lr=0.15, seed=0, reward="countdown", held_out=128)
model, tokenizer, train, test = common.load(o.seed)
optimizer = torch.optim.SGD(model.parameters(), lr=o.lr)


# %% The update
def update(samples: list[common.Sample], weights: list[float]) -> float:
    """One step up the gradient of the mean over all tokens of weight * log-probability. Returns the gradient's norm."""
    tokens = sum(len(sample.response) for sample in samples)
    for ids, mask, weight in common.micro_batches(samples, weights):
        log_p = -cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = -(weight * log_p * mask).sum() / tokens
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


# %% The loop: draw responses, score them, make those with a high score likelier
run = common.Run(o.name)
for step in range(o.steps):
    samples = common.sample(model, tokenizer, common.batch_of(train, step, o.prompts), o.n, o.reward)
    weights = [sample.score for sample in samples]
    run.step(step, samples, gradient_norm=update(samples, weights))

# %% The held-out problems, and the curve
run.finish(model, tokenizer, test[: o.held_out])
