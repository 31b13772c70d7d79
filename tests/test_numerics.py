"""What verl computes under each recipe, against the published formula, written out here again.

Fixed log-probabilities, rewards, values and masks go through the functions that verl's trainer and workers call, with
the recipe's composed configuration; loss and gradient must be those of the formula. Sources: TinyZero,
verl/trainer/ppo/core_algos.py at b19c457; TRL 0.14.0, trl/trainer/grpo_trainer.py; arXiv 2503.14476 (DAPO),
2503.20783 (Dr. GRPO), 2402.14740 (RLOO), 2507.18071 (GSPO), 2506.13585 (CISPO), 2511.20347 (SAPO), 2507.20673 (GMPO),
2504.02546 (GPG), 2501.03262 (REINFORCE++), 2505.23585 (OPO), 2503.19595 (pass@k), 2602.04879 (DPPO),
2505.22617 (Clip-Cov, KL-Cov).
"""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configurations import compose, options
from omegaconf import open_dict
from tensordict import TensorDict

from verl_recipes.settings.configuration import ESTIMATORS, LOSSES

pytestmark = pytest.mark.slow

GROUPS, N, LENGTH = 3, 4, 6
MASK = (torch.arange(LENGTH) < torch.tensor([6, 3, 5, 1, 2, 6, 4, 4, 3, 5, 6, 2])[:, None]).float()
SCORES = torch.tensor([0.1, 1.0, 0.0, 0.1, 2.0, 1.0, 0.0, 1.0, 0.1, 0.1, 0.1, 0.1])  # the last group has no signal
SEED = 3  # of what a loss draws
WITH_SEVERAL_UPDATES = (
    "tinyzero_ppo",
    "tinyzero_grpo",
    "dapo",
    "dr_grpo",
    "gspo",
    "cispo",
    "sapo",
    "gmpo",
    "grpo_passk",
    "dppo_tv",
    "dppo_kl",
    "clip_cov",
    "kl_cov",
)
ON_POLICY = ("tiny", "mini_r1", "datawhale_r1", "datawhale_r1_article", "rloo", "gpg", "opo")
ON_POLICY += ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "minrl", "warm_rloo", "middle")


def config_of(recipe):
    return compose("train", f"recipe={recipe}", "model=qwen2.5_3b", "hardware=a800_x4")


def test_a_run_may_name_verls_algorithms_and_no_others():
    from verl.trainer.ppo import core_algos

    import verl_recipes.in_verl.losses  # noqa: F401, which registers gmpo

    known = core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY
    assert [set(each) for each in known] == [{*ESTIMATORS}, {*LOSSES}]


@pytest.fixture(params=WITH_SEVERAL_UPDATES + ON_POLICY)
def case(request):
    """A recipe, and a batch as it reaches the loss: on the first update of a step, log_prob equals old_log_probs."""
    generator = torch.Generator().manual_seed(7)

    def normal(scale, shift=0.0):
        return torch.randn(GROUPS * N, LENGTH, generator=generator) * scale + shift

    old, config = normal(0.5, -1.5), config_of(request.param)
    config.actor_rollout_ref.actor.policy_loss.clip_cov_lb = 0.3  # so few tokens have no covariance of 1
    return SimpleNamespace(
        recipe=request.param,
        config=config,
        old=old,
        now=(old if request.param in ON_POLICY else old + normal(0.3)).clone().requires_grad_(),
        reference=old + normal(0.2),
        entropy=normal(0.1, 1.0).clone().requires_grad_(),
        values=normal(0.3, 0.5),
    )


# The formulas.


def mean_over_tokens(x):
    return (x * MASK).sum() / MASK.sum()


def mean_over_responses(x):
    """The mean over responses of the mean over a response's tokens."""
    return ((x * MASK).sum(1) / MASK.sum(1)).mean()


def clipped(ratio, advantage, low, high):
    """PPO's objective for each token (arXiv 1707.06347, equation 7), as a loss."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def over_groups(f):
    """f of each group's scores, as a column that broadcasts over tokens."""
    return torch.cat([f(group) for group in SCORES.view(GROUPS, N)])[:, None]


def group_advantage(epsilon):
    return over_groups(lambda r: (r - r.mean()) / (r.std() + epsilon))


def k3(case):
    """Schulman's estimator of the KL divergence from the reference."""
    log_ratio = case.reference - case.now
    return log_ratio.exp() - log_ratio - 1


def rewards_with_kl(case):
    """The score on the last token, less the KL divergence of each (TinyZero, apply_kl_penalty with "kl")."""
    rewards = -0.001 * (case.old - case.reference) * MASK
    rewards[torch.arange(len(MASK)), MASK.sum(1).long() - 1] += SCORES
    return rewards


def tinyzero_advantage(case):
    """GAE with gamma = lambda = 1, so the reward to come less the value, whitened over the tokens; and the returns."""
    returns = rewards_with_kl(case).flip(1).cumsum(1).flip(1)
    raw = returns - case.values
    return (raw - raw[MASK > 0].mean()) / raw[MASK > 0].std(), returns


def tinyzero_ppo(case):
    advantage, _ = tinyzero_advantage(case)
    policy = mean_over_tokens(clipped((case.now - case.old).exp(), advantage, 0.2, 0.2))
    return policy - 0.001 * mean_over_tokens(case.entropy)


def tinyzero_grpo(case):
    """With the KL loss added; TinyZero's dp_actor.py subtracts it (line 267 at b19c457), a fault of sign."""
    policy = mean_over_tokens(clipped((case.now - case.old).exp(), group_advantage(1e-6), 0.2, 0.2))
    return policy - 0.001 * mean_over_tokens(case.entropy) + 0.001 * mean_over_tokens(k3(case))


def trl_grpo(case, epsilon=1e-6):
    """TRL 0.14's loss; its own epsilon is 1e-4, see the next test."""
    ratio = (case.now - case.now.detach()).exp()
    return mean_over_responses(-(ratio * group_advantage(epsilon) - 0.001 * k3(case)))


def tiny(case):
    return mean_over_tokens(-(case.now - case.now.detach()).exp() * group_advantage(1e-6))


def dapo(case):
    """Equation 8, without the groups that dynamic sampling leaves out (equation 11)."""
    return mean_over_tokens(clipped((case.now - case.old).exp(), group_advantage(1e-6), 0.2, 0.28))


def dr_grpo(case):
    """The sum over a response's tokens by a constant, here the longest response's length (its Listing 1)."""
    advantage = over_groups(lambda r: r - r.mean())
    return ((clipped((case.now - case.old).exp(), advantage, 0.2, 0.2) * MASK).sum(1) / 1024).mean()


def rloo(case):
    """Equation 9's gradient: each response's log-probability times its reward less the mean of the others'."""
    totals = rewards_with_kl(case).sum(1).view(GROUPS, N)
    advantage = totals - (totals.sum(1, keepdim=True) - totals) / (N - 1)
    log_probs = ((case.now - case.now.detach()).exp() * MASK).sum(1)
    return -(log_probs * advantage.flatten()).mean()


def of_responses(x):
    """The mean over a response's tokens, as a column."""
    return ((x * MASK).sum(1) / MASK.sum(1))[:, None]


def gspo(case):
    """Equations 5 to 7: the ratio of a whole response, to the power of one over its length."""
    ratio = of_responses(case.now - case.old).exp()
    return clipped(ratio, group_advantage(1e-6), 3e-4, 4e-4).mean()


def cispo(case):
    """Equation 4, with a ratio that is clipped above alone, and has no gradient."""
    ratio = (case.now - case.old).exp().clamp(max=1.2).detach()
    return -mean_over_tokens(ratio * group_advantage(1e-6) * case.now)


def sapo(case):
    """Equations 5 and 6: the sigmoid of the ratio's distance from 1, times 4 / tau."""
    advantage = group_advantage(1e-6)
    tau = torch.where(advantage > 0, 1.0, 1.05)
    gate = torch.sigmoid(tau * ((case.now - case.old).exp() - 1)) * 4 / tau
    return -mean_over_responses(gate * advantage)


def gmpo(case):
    """Equation 4: the geometric mean of the ratios, of which each is clipped where the advantage would profit."""
    advantage, log_ratio = group_advantage(1e-6), case.now - case.old
    bounded = log_ratio.clamp(-0.4, 0.4)
    kept = torch.where(advantage > 0, torch.minimum(log_ratio, bounded), torch.maximum(log_ratio, bounded))
    return -(of_responses(kept).exp() * advantage).mean()


def gpg(case):
    """Equation 6 with F_norm = 1; alpha as verl counts it, by rewards of 0 and not by groups without a signal."""
    alpha = len(SCORES) / SCORES.count_nonzero()
    return -mean_over_tokens(case.now * alpha * over_groups(lambda r: r - r.mean()))


def whitened(x):
    """With mean 0 and variance 1 over all tokens."""
    return (x - x[MASK > 0].mean()) / x[MASK > 0].std()


def on_policy(case, advantage):
    return -mean_over_tokens((case.now - case.now.detach()).exp() * advantage)


def minrl(case):
    """GRPO without the division by the standard deviation."""
    return on_policy(case, over_groups(lambda r: r - r.mean()))


def warm_rloo(case):
    """RLOO with an entropy bonus, summed over a response as its loss is."""
    return rloo(case) - 0.001 * (case.entropy * MASK).sum(1).mean()


def reinforce_plus_plus(case):
    """The rewards to come of each token, less the KL divergence of each, whitened over the batch."""
    return on_policy(case, whitened(rewards_with_kl(case).flip(1).cumsum(1).flip(1)))


def reinforce_plus_plus_baseline(case):
    totals = rewards_with_kl(case).sum(1).view(GROUPS, N)
    raw = (totals - totals.mean(1, keepdim=True)).flatten()[:, None].expand(-1, LENGTH)
    return on_policy(case, whitened(raw))


def opo(case):
    """Equation 9: the baseline is the group's mean reward, weighted by the responses' lengths."""
    lengths, scores = MASK.sum(1).view(GROUPS, N), SCORES.view(GROUPS, N)
    baseline = (lengths * scores).sum(1, keepdim=True) / lengths.sum(1, keepdim=True)
    return on_policy(case, (scores - baseline).flatten()[:, None])


def grpo_passk(case):
    """The best of a group gets what it has over the second best, and all others nothing."""

    def ahead(r):
        best, second = r.topk(2).values
        return torch.where(torch.arange(N) == r.argmax(), best - second, 0.0)

    return mean_over_tokens(clipped((case.now - case.old).exp(), over_groups(ahead), 0.2, 0.2))


def dppo(case, diverges, threshold):
    """A token counts unless it moves the policy away from the old one, and this is too far from it."""
    advantage, old, now = over_groups(lambda r: r - r.mean()), case.old.exp(), case.now.exp()
    away = torch.where(advantage > 0, now > old, now < old)
    kept = (~(away & (diverges(old, now) > threshold))).float()
    return -((advantage * (now / old).detach() * kept.detach() * case.now * MASK).sum(1) / 1024).mean()


def dppo_tv(case):
    return dppo(case, lambda old, now: (now - old).abs(), 0.15)


def dppo_kl(case):
    """The divergence of two coins, "this token" and "another"."""

    def of_coins(old, now):
        return old * (old / now).log() + (1 - old) * ((1 - old) / (1 - now)).log()

    return dppo(case, of_coins, 0.05)


def covariance(case):
    """How much each token's log-probability and advantage vary together."""
    advantage = group_advantage(1e-6).expand(-1, LENGTH)
    return ((advantage - mean_over_tokens(advantage)) * (case.now - mean_over_tokens(case.now))).detach()


def clip_cov(case):
    """Clip-Cov: one of the tokens that are not clipped, with a covariance between the bounds, drawn as verl does."""
    low = case.config.actor_rollout_ref.actor.policy_loss.clip_cov_lb
    ratio, advantage = (case.now - case.old).exp(), group_advantage(1e-6)
    loss = clipped(ratio, advantage, 1.0, 1.0)
    may = (covariance(case) > low) & (covariance(case) < 5) & (MASK > 0) & (loss <= -ratio * advantage)
    tokens = may.nonzero()
    assert len(tokens) > 1
    torch.manual_seed(SEED)
    row, column = tokens[torch.randperm(len(tokens))[0]]
    kept = torch.ones_like(MASK)
    kept[row, column] = 0
    return mean_over_tokens(loss * kept)


def kl_cov(case):
    """KL-Cov: the token of the largest covariance pays for its distance from the old policy."""
    log_ratio = case.now - case.old
    largest = covariance(case).masked_fill(MASK == 0, -torch.inf).argmax()
    pays = (torch.arange(MASK.numel()) == largest).view(MASK.shape)
    return mean_over_tokens(-log_ratio.exp() * group_advantage(1e-6) + pays * log_ratio.abs())


FORMULAS = {
    f.__name__: f for f in (tinyzero_ppo, tinyzero_grpo, tiny, dapo, dr_grpo, rloo, gspo, cispo, sapo, gmpo, gpg)
}
FORMULAS |= {f.__name__: f for f in (reinforce_plus_plus, reinforce_plus_plus_baseline, opo, grpo_passk)}
FORMULAS |= {f.__name__: f for f in (dppo_tv, dppo_kl, clip_cov, kl_cov)}
FORMULAS |= {"minrl": minrl, "warm_rloo": warm_rloo, "middle": tiny}
FORMULAS |= dict.fromkeys(("mini_r1", "datawhale_r1", "datawhale_r1_article"), trl_grpo)


def test_every_recipe_has_its_formula():
    assert {*WITH_SEVERAL_UPDATES, *ON_POLICY} == {*FORMULAS} == {*options("recipe")}


# What verl computes.


def nested(tensor, rows=slice(None)):
    lengths = MASK.sum(1).long()
    parts = [row[:n] for row, n in zip(tensor[rows], lengths[rows], strict=True)]
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def after_one_prompt_token(tensor, rows=slice(None)):
    """A model's output for a prompt of one token and the response: entry i is about token i + 1."""
    lengths = MASK.sum(1).long()
    parts = [torch.cat([row[:n], torch.zeros(1)]) for row, n in zip(tensor[rows], lengths[rows], strict=True)]
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def advantages_of(case):
    """As in verl's PPOTrainer._compute_advantage."""
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_kl_controller
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    algorithm = case.config.algorithm
    scores = torch.zeros_like(MASK)
    scores[torch.arange(len(MASK)), MASK.sum(1).long() - 1] = SCORES
    uid = np.array([f"g{i // N}" for i in range(len(MASK))], dtype=object)
    tensors = {"token_level_scores": scores, "token_level_rewards": scores, "response_mask": MASK}
    tensors |= {"old_log_probs": case.old, "ref_log_prob": case.reference, "values": case.values}
    data = DataProto.from_dict(tensors, non_tensors={"uid": uid})
    if algorithm.use_kl_in_reward:
        data, _ = apply_kl_penalty(data, get_kl_controller(algorithm.kl_ctrl), algorithm.kl_penalty)
    data = compute_advantage_for_multi_trajectories(
        data,
        batch_keys=[f"{name}_{i}_0" for i, name in enumerate(uid)],
        adv_estimator=algorithm.adv_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
        config=algorithm,
    )
    return data.batch["advantages"], data.batch["returns"]


def batch_of(case, **columns):
    rows = {"prompts": torch.nested.as_nested_tensor([torch.zeros(1)] * len(MASK), layout=torch.jagged)}
    rows |= {name: nested(column) for name, column in {"responses": MASK, "response_mask": MASK, **columns}.items()}
    from verl.utils import tensordict_utils as tu

    data = TensorDict(rows, batch_size=len(MASK))
    tokens = int(MASK.sum())
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(MASK))
    return data


def test_the_loss_and_its_gradient_are_those_of_the_published_formula(case):
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    actor = case.config.actor_rollout_ref.actor
    advantages, _ = advantages_of(case)
    output = {"log_probs": after_one_prompt_token(case.now)}
    if actor.entropy_coeff != 0:
        output["entropy"] = after_one_prompt_token(case.entropy)
    data = batch_of(case, old_log_probs=case.old, advantages=advantages, ref_log_prob=case.reference)
    torch.manual_seed(SEED)
    loss, _ = ppo_loss(omega_conf_to_dataclass(actor), output, data)
    published = FORMULAS[case.recipe](case)
    torch.testing.assert_close(loss, published, rtol=2e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, case.now)[0]
    theirs = torch.autograd.grad(published, case.now)[0]
    torch.testing.assert_close(ours * MASK, theirs * MASK, rtol=2e-5, atol=1e-8)
    assert theirs.abs().max() > 1e-5


@pytest.mark.parametrize("case", ["gmpo", "tinyzero_grpo", "gspo"], indirect=True)
def test_the_gradient_does_not_depend_on_how_an_update_is_cut_into_micro_batches(case):
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    actor = case.config.actor_rollout_ref.actor
    actor.entropy_coeff = 0
    advantages, _ = advantages_of(case)

    def gradient(*cuts):
        total = 0.0
        for rows in cuts:
            columns = {"old_log_probs": case.old, "advantages": advantages, "ref_log_prob": case.reference}
            names = {"responses": MASK, "response_mask": MASK, **columns}
            prompts = torch.nested.as_nested_tensor([torch.zeros(1)] * len(MASK[rows]), layout=torch.jagged)
            parts = {name: nested(column, rows) for name, column in names.items()}
            data = TensorDict({"prompts": prompts} | parts, batch_size=len(MASK[rows]))
            tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(MASK.sum()), global_batch_size=len(MASK))
            output = {"log_probs": after_one_prompt_token(case.now, rows)}
            total = total + ppo_loss(omega_conf_to_dataclass(actor), output, data)[0]
        return torch.autograd.grad(total, case.now)[0] * MASK

    cut = gradient(slice(0, 3), slice(3, None))
    torch.testing.assert_close(cut, gradient(slice(None)), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("case", ["mini_r1", "datawhale_r1"], indirect=True)
def test_trls_epsilon_differs_by_less_than_a_thousandth(case):
    ours, _ = advantages_of(case)
    trl = (group_advantage(1e-4) * MASK)[: 2 * N]
    assert ((ours[: 2 * N] - trl).abs() <= 1e-3 * trl.abs()).all()
    assert ours[2 * N :].abs().max() == 0


@pytest.mark.parametrize("case", ["tinyzero_ppo"], indirect=True)
def test_the_critics_loss_is_tinyzeros(case):
    """Half the mean of the larger squared error: of the value, or of the value clipped to 0.5 around the old."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import value_loss

    with open_dict(case.config):
        case.config.critic.model = None  # its dataclass would load a tokenizer
    _, returns = advantages_of(case)
    _, published = tinyzero_advantage(case)
    torch.testing.assert_close(returns * MASK, published * MASK)
    new = case.values + torch.linspace(-2, 2, LENGTH)
    bounded = torch.minimum(torch.maximum(new, case.values - 0.5), case.values + 0.5)
    expected = 0.5 * mean_over_tokens(torch.maximum((new - published) ** 2, (bounded - published) ** 2))
    data = batch_of(case, values=case.values, returns=returns)
    loss, _ = value_loss(omega_conf_to_dataclass(case.config.critic), {"values": after_one_prompt_token(new)}, data)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("kl", lambda d: d),
        ("abs", lambda d: d.abs()),
        ("mse", lambda d: d**2 / 2),
        ("low_var_kl", lambda d: (-d).exp() + d - 1),
    ],
)
def test_the_kinds_of_kl_are_schulmans(kind, formula):
    """joschu.net/blog/kl-approx.html, with d = log p - log reference; TinyZero's by these names."""
    from verl.trainer.ppo.core_algos import kl_penalty

    now, reference = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(kl_penalty(now, reference, kind), formula(now - reference))


@pytest.mark.parametrize("length", [700, 820, 922, 1024])
def test_the_overlong_penalty_is_dapos(length):
    """Equation 13: 0 up to L_max - L_cache, then linear to -1 at L_max, with the recipe's lengths."""
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager

    config = config_of("dapo")
    assert config.reward.reward_manager.name == "dapo"
    longest, cache = 1024, config.reward.reward_kwargs.overlong_buffer_cfg.len
    tokens = {
        "responses": torch.zeros(1, length, dtype=torch.long),
        "attention_mask": torch.ones(1, length, dtype=torch.long),
    }
    others = {"data_source": ["countdown"], "reward_model": [{"ground_truth": "x"}]}

    async def score():
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "")
        manager = DAPORewardManager(config, tokenizer, lambda **_: {"score": 1.0})
        return await manager.run_single(DataProto.from_dict(tokens, non_tensors=others))

    expected = 1.0 + min(max((longest - cache - length) / cache, -1.0), 0.0)
    assert float(asyncio.run(score())["reward_score"]) == pytest.approx(expected)


@pytest.mark.parametrize("scorer", ["the recipe's", "a number", "without acc"])
def test_a_row_reports_the_score_with_the_overlong_penalty_that_was_trained_on(scorer):
    """From verl's reward manager and the fields of its TransferQueue to the sampler's row, under the recipe dapo."""
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    from verl_recipes.in_verl.sampler import FIELDS, CountdownReplayBuffer

    config = config_of("dapo")
    function = {"the recipe's": get_custom_reward_fn(config), "a number": lambda **_: 1.0}
    function |= {"without acc": lambda **_: {"score": 1.0}}
    text = "so</think>\n<answer>(18-11)*25</answer>"
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: text)
    lengths = {512: 0.0, 922: -(922 - 820) / 204, 1024: -1.0}
    assert config.data.max_response_length - config.reward.reward_kwargs.overlong_buffer_cfg.len == 820

    async def verdict(data):
        return await DAPORewardManager(config, tokenizer, function[scorer]).run_single(data)

    fields = []
    for length in lengths:
        field = {
            "prompts": torch.zeros(9, dtype=torch.long),
            "responses": torch.zeros(length, dtype=torch.long),
            "reward_model": {"ground_truth": {"numbers": [11, 18, 25], "target": 175}, "style": "rule"},
            "data_source": "countdown/3_numbers",
            "extra_info": {"split": "train", "index": 0},
        }
        tokens = {"responses": field["responses"][None], "attention_mask": torch.ones(1, 9 + length, dtype=torch.long)}
        others = {name: [field[name]] for name in ("data_source", "reward_model", "extra_info")}
        given = asyncio.run(verdict(DataProto.from_dict(tokens, non_tensors=others)))
        field["rm_scores"] = torch.zeros(length)
        field["rm_scores"][-1] = given["reward_score"]
        field["extra_fields"] = {"reward_extra_info": given["reward_extra_info"]}
        fields.append(field)
    data = list_of_dict_to_tensordict(fields)
    sampler = SimpleNamespace(tokenizer=tokenizer, sampler_kwargs={"response_length": 1024})
    columns = zip(*(data[name] for name in FIELDS), strict=True)
    rows = [CountdownReplayBuffer.row(sampler, dict(zip(FIELDS, values, strict=True))) for values in columns]
    for row, penalty in zip(rows, lengths.values(), strict=True):
        assert row["score"] == pytest.approx(1.0 + penalty, abs=1e-6)
        assert (row["reward_score"], row["acc"]) == (1.0, 1.0)
        assert row["overlong_reward"] == pytest.approx(penalty)
        assert all(isinstance(value, float) for name, value in row.items() if name.startswith("reason/"))
    assert [row["truncated"] for row in rows] == [False, False, True]
    assert rows[0]["ground_truth"]["numbers"] == [11, 18, 25]


def learning_rates(optim, steps):
    """The rate of each optimizer step, from the scheduler that verl's FSDP engine builds."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    config = omega_conf_to_dataclass(optim)
    config.total_training_steps = steps  # as verl's trainer does
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = FSDPEngine._build_lr_scheduler(SimpleNamespace(optimizer_config=config, rank=1), optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("recipe", ["mini_r1", "datawhale_r1"])
def test_the_learning_rate_is_transformers_cosine_with_warm_up(recipe):
    """transformers' get_cosine_schedule_with_warmup, with ceil(0.03 x 450) = 14 steps of warm-up."""

    def published(step):
        done = step - 1
        if done < 14:
            return 5e-7 * done / 14
        return 5e-7 * 0.5 * (1 + math.cos(math.pi * (done - 14) / (450 - 14)))

    config = config_of(recipe)
    assert config.trainer.total_training_steps == 450
    rates = learning_rates(config.actor_rollout_ref.actor.optim, 450)
    for step, value in ((1, 0.0), (14, 4.642857e-7), (225, 2.644050e-7), (450, 6.490218e-12)):
        assert rates[step - 1] == pytest.approx(published(step), rel=1e-6)
        assert rates[step - 1] == pytest.approx(value, rel=1e-5)


def test_dapos_learning_rate_warms_up_over_ten_steps():
    rates = learning_rates(config_of("dapo").actor_rollout_ref.actor.optim, 500)
    assert rates[:11] == pytest.approx([1e-7 * step for step in range(11)])
    assert set(rates[10:]) == {1e-6}


def test_tinyzeros_learning_rates_are_constant():
    config = config_of("tinyzero_ppo")
    for optim, rate in ((config.actor_rollout_ref.actor.optim, 1e-6), (config.critic.optim, 1e-5)):
        rates = learning_rates(optim, 450)
        assert [rates[step - 1] for step in (1, 14, 225, 450)] == [rate] * 4


def token_weights(log_ratio, low, high):
    """Truncated above without a lower bound (arXiv 2505.24298), or nothing outside of the bounds (IcePop)."""
    ratio = log_ratio.exp() * MASK
    return ratio.clamp(max=high) if low is None else ratio * ((ratio >= low) & (ratio <= high))


@pytest.mark.parametrize("option", options("correction"))
def test_a_correction_weighs_by_the_trainers_probability_over_the_rollouts(option):
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

    generator = torch.Generator().manual_seed(1)
    old = torch.randn(MASK.shape, generator=generator) * 0.5 - 2
    scale = 0.001 if option == "geo_rs" else 0.7
    log_ratio = torch.randn(MASK.shape, generator=generator) * scale
    tensors = {"old_log_probs": old, "rollout_log_probs": old - log_ratio, "response_mask": MASK.clone()}
    config = compose("train", f"correction={option}").algorithm.rollout_correction
    data, _ = compute_rollout_correction_and_add_to_batch(DataProto.from_dict(tensors), config)
    weights, mask = data.batch.get("rollout_is_weights"), data.batch["response_mask"]
    of_whole = (log_ratio * MASK).sum(1, keepdim=True)
    expected = {
        "token_tis": lambda: token_weights(log_ratio, None, 2.0),
        "icepop": lambda: token_weights(log_ratio, 0.5, 5.0),
        "sequence_tis": lambda: of_whole.exp().clamp(max=2.0) * MASK,
    }
    if option in expected:
        torch.testing.assert_close(weights, expected[option]())
        assert 0 < (weights[MASK > 0] != log_ratio.exp()[MASK > 0]).float().mean() <= 1  # the bounds were reached
    else:
        assert weights is None
    if option == "geo_rs":
        kept = (of_whole / MASK.sum(1, keepdim=True)).abs() <= 0.001
        assert 0 < kept.sum() < len(MASK)
        torch.testing.assert_close(mask, MASK * kept)
    else:
        torch.testing.assert_close(mask, MASK)
