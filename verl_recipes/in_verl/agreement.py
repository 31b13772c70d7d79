"""The guard of a run's weights: rollout engine and actor say the same of the responses, or the run ends.

verl has a metric of it, and goes on whatever it says; with `rollout_correction.bypass_mode` it has not even that.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from verl_recipes.in_verl.sampling import kept_share
from verl_recipes.settings.configuration import STALENESS

if TYPE_CHECKING:  # what a class here is added to; at run time verl's engines may still be loading
    from verl.workers.engine import FSDPEngineWithLMHead as Engine
else:
    Engine = object

Loss = Callable[..., Any] | None
# Below this correlation the rollout engine does not hold the actor's weights. In fp32 it is 0.9999 in every run of this
# project. In bf16, 0.977 to 0.999 was published of engines that held the same weights, and 0.13 to 0.5 of others.
# Where `staleness` allows it, weights of an earlier step began the responses.
AGREEMENT, IN_BF16, STALE = 0.99, 0.95, 0.8


def correlation(rollout_log_probs: Tensor, log_probs: Tensor) -> float:
    """Pearson correlation of two sets of token probabilities, given as log-probabilities of shape (tokens,).

    verl's `training/rollout_actor_probs_pearson_corr`, after arXiv 2506.13585. 1.0 if it is not defined because one of
    the two is constant.
    """
    pair = torch.stack([rollout_log_probs, log_probs]).double().exp()
    value = torch.corrcoef(pair)[0, 1].item() if pair.shape[1] > 1 else 1.0
    return 1.0 if math.isnan(value) else value


def agreement(
    responses: Tensor,
    rollout: Tensor,
    log_probs: Tensor,
    nucleus: float = 1.0,
    least: float = AGREEMENT,
    written: Tensor | None = None,
) -> float:
    """How well the rollout engine's log-probabilities fit the actor's weights, as a correlation.

    Args:
        responses: nested, shape (batch, response tokens).
        rollout: the rollout engine's log-probabilities, in the same shape.
        log_probs: the actor's, nested, shape (batch, prompt and response tokens); entry i predicts token i + 1.
        nucleus: the least share of the probability that sampling kept. vLLM renormalises its log-probabilities over it,
            so they may be larger by up to -log(nucleus).
        least: the least correlation.
        written: nested, in the shape of responses: 0 for a token that the model did not write. verl gives these, a
            tool's answer or a row that pads a batch, the probability 1.

    Raises:
        RuntimeError: the correlation of the probabilities is under `least`, or one of them is not a number.
    """
    lengths = [len(response) for response in responses.unbind()]
    rows = zip(log_probs.unbind(), rollout.unbind(), lengths, strict=True)
    pairs = [(row[-length - 1 : -1].float(), said[:length].reshape(-1)) for row, said, length in rows]
    actor, said = torch.cat([row for row, _ in pairs]).cpu(), torch.cat([said for _, said in pairs]).float().cpu()
    if written is not None:
        own = torch.cat([row[:length] for row, length in zip(written.unbind(), lengths, strict=True)]).bool().cpu()
        actor, said = actor[own], said[own]
    if (said + actor).isnan().any():
        raise RuntimeError(
            "rollout and actor disagree: some of their token probabilities are not numbers. One of them has broken "
            "weights: lower learning_rate, or go on from an earlier checkpoint"
        )
    more = (said - actor).clamp(min=0.0, max=-math.log(nucleus) if nucleus else math.inf)
    value = correlation(said - more if nucleus < 1 else said, actor)
    if value < least:
        why = (
            "The rollout engine does not hold the actor's weights, and training on its samples would corrupt the model."
        )
        if least == STALE:
            why = "The weights that wrote the responses are too far from the actor's: lower staleness or learning_rate."
        raise RuntimeError(
            f"rollout and actor disagree: their token probabilities correlate at {value:.4f}, under {least}. {why}"
        )
    return value


class Guarded(Engine):
    """Added to an engine of the policy: its first pass over samples after it gave the rollout engine weights compares.

    With `rollout_correction.bypass_mode`, which has no pass of its own for the old log-probabilities, that is the
    update's.
    """

    unchecked = True
    is_base = False

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Of LoRA: within it the model is its base, the reference."""
        self.is_base = True
        try:
            with super().disable_adapter():
                yield
        finally:
            self.is_base = False

    def get_per_tensor_param(self, *args: Any, **kwargs: Any) -> Any:
        self.unchecked = True
        return super().get_per_tensor_param(*args, **kwargs)

    def forward_backward_batch(self, data: TensorDict, loss_function: Loss, forward_only: bool = False) -> Any:
        rollout = data.get("rollout_log_probs", None)
        check = self.unchecked and rollout is not None and not (self.engine_config.forward_only or self.is_base)
        if check:
            tu.assign_non_tensor(data, return_model_output=True)
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if check:
            exact = AGREEMENT if self._autocast_dtype == torch.float32 else IN_BF16
            least = STALE if int(os.environ.get(STALENESS, "0")) else exact
            said, written = output["model_output"]["log_probs"], data["loss_mask"]
            value = agreement(data["responses"], rollout, said, kept_share(), least, written)
            self.unchecked = False
            if not forward_only:  # for the other pass verl has a metric
                output["metrics"]["rollout_actor_probs_pearson_corr"] = [value]
        return output
