"""python learn/5_kl.py [key=value ...]: what script 4 does, and a KL term that holds the model near a reference.

The reward sees only what it was written to see. What it does not see (prose, other languages, other tasks) may drift as
far as it likes, and a reward that can be gamed will be. So GRPO keeps a frozen copy of the base, the reference, and
adds to the loss how far the model has moved away from it, on the tokens that were drawn:

    kl * min(exp(d) - d - 1, 10)   with d = log p_reference(token) - log p(token)

Its mean over what the model draws is the KL divergence of the model from the reference (Schulman's k3 estimator,
http://joschu.net/blog/kl-approx.html): never negative, and 0 only if both agree. The bound is for its exponential,
which a few unlikely tokens can drive to a million. The price is one more pass over each batch and a second copy of the
weights.

What to look at: `kl_to_base` beside the accuracy, for `kl=0`, the default 0.04, and `kl=1`.
"""

# %% What can be changed on the command line, and the model, its problems and an optimizer
import copy

import common
import torch
from torch.nn.functional import cross_entropy

o = common.options(
    "5_kl",
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
    kl=0.04,
)
model, tokenizer, train, test = common.load(o.seed)
reference = copy.deepcopy(model)  # never updated
optimizer = torch.optim.SGD(model.parameters(), lr=o.lr)


# %% The update
def update(samples: list[common.Sample], advantages: list[float]) -> tuple[float, float]:
    """One step up the gradient of the clipped objective less the KL term. Returns its norm, the mean KL."""
    tokens, mean_kl = sum(len(sample.response) for sample in samples), 0.0
    drawn_with = [sample.log_probabilities for sample in samples]
    for ids, mask, advantage, old_log_p in common.micro_batches(samples, advantages, drawn_with):
        log_p = -cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        ratio = torch.exp(log_p - old_log_p)
        plain, bounded = ratio * advantage, ratio.clamp(1 - o.clip, 1 + o.clip) * advantage
        with torch.no_grad():
            ref_log_p = -cross_entropy(reference(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        d = ref_log_p - log_p
        kl = (torch.exp(d) - d - 1).clamp(max=10)
        loss = ((o.kl * kl - torch.min(plain, bounded)) * mask).sum() / tokens
        loss.backward()
        mean_kl += float((kl.detach() * mask).sum()) / tokens
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm), mean_kl


# %% The loop: draw responses, score them, make those better than their group likelier, in several updates
run = common.Run(o.name)
for step in range(o.steps):
    samples = common.sample(model, tokenizer, common.batch_of(train, step, o.prompts), o.n, o.reward)
    scores = torch.tensor([sample.score for sample in samples]).view(o.prompts, o.n)  # a row is a group
    deviation = scores.std(1, keepdim=True)
    advantages = ((scores - scores.mean(1, keepdim=True)) / (deviation + 1e-6)).flatten().tolist()
    size = len(samples) // o.updates
    parts = [slice(start, start + size) for start in range(0, len(samples), size)]
    norms, kls = zip(*(update(samples[part], advantages[part]) for part in parts * o.epochs), strict=True)
    run.step(step, samples, gradient_norm=max(norms), kl_to_base=sum(kls) / len(kls))

# %% The held-out problems, and the curve
run.finish(model, tokenizer, test[: o.held_out])
