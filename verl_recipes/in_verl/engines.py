"""verl's FSDP2 engines as this project trains with them, on any device."""

from typing import Any

import torch
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

from verl_recipes.in_verl.agreement import Guarded
from verl_recipes.in_verl.reshard import Resharding


@EngineRegistry.register("language_model", "fsdp2", "cuda", "nvidia")  # verl looks for a vendor's before its own
class PolicyEngine(Guarded, Resharding, FSDPEngineWithLMHead):
    """Policy and reference."""

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(self.engine_config.seed)  # of an adapter's first weights; verl leaves them to chance
        return super()._build_lora_module(module)

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        # verl 0.9.1 shards an untied head by itself, and its fused kernels read the weight without a call of the head,
        # which would gather it. With the root's parameters, as a tied head is, it is whole in every pass.
        config: Any = module.config
        tied = config.tie_word_embeddings
        config.tie_word_embeddings = tied or self.model_config.use_fused_kernels
        try:
            return super()._build_fsdp_module(module)
        finally:
            config.tie_word_embeddings = tied


@EngineRegistry.register("value_model", "fsdp2", "cuda", "nvidia")
class ValueEngine(Resharding, FSDPEngineWithValueHead):
    """PPO's critic, with the attention that its configuration names.

    verl.utils.model.load_valuehead_model asks for flash_attention_2 whatever that says. verl loads a language model as
    configured, and of the class that the first of its `architectures` names, so the critic is loaded as one.
    """

    def _build_module(self) -> torch.nn.Module:
        model, config = self.model_config, self.model_config.hf_config
        config.num_labels, config.classifier_dropout, config.hidden_dropout = 1, 0.0, 0.0
        kept = model.model_type, config.architectures
        torch.manual_seed(self.engine_config.seed)  # of the head's first weights; verl leaves them to chance
        model.model_type = "language_model"
        config.architectures = [config.architectures[0].replace("ForCausalLM", "ForTokenClassification")]
        try:
            return super()._build_module()
        finally:
            model.model_type, config.architectures = kept
