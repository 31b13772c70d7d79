"""GMPO's loss as published: the mean over all responses of an update.

verl 0.9.1's `geo_mean` is the mean over a micro-batch, and its engines add micro-batches up. So the gradient would grow
with their number, and a response in a small one, which long ones share, would weigh more.
"""

from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import compute_policy_loss_geo_mean, register_policy_loss


@register_policy_loss("gmpo")
def gmpo(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `geo_mean` (arXiv 2507.20673), weighed by the micro-batch's share of the update's responses.

    Args:
        old_log_prob, log_prob, advantages, response_mask: shape (responses, tokens).
    """
    loss, metrics = compute_policy_loss_geo_mean(old_log_prob, log_prob, advantages, response_mask, *args, **kwargs)
    whole = kwargs["config"].global_batch_info
    return loss * len(response_mask) / whole["global_batch_size"] * whole["dp_size"], metrics
