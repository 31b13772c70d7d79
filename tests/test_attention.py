"""`torch_varlen` beside sdpa: values and gradients, packed and padded, policy and critic."""

import copy
from types import SimpleNamespace

import pytest
import torch
from configurations import compose
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.nn.functional import scaled_dot_product_attention

from data_prep.cli import CONFIGS, UserError
from verl_recipes.in_verl import attention
from verl_recipes.settings.configuration import check_attention

pytestmark = pytest.mark.slow
TINY = CONFIGS.parent / "assets" / "tiny_base"
HEADS = sorted(  # of queries and keys, in each Qwen2.5
    {(a.num_attention_heads, a.num_key_value_heads) for a in (
        OmegaConf.load(path).architecture for path in (CONFIGS / "model").glob("qwen2.5_*b.yaml")
    )}
)  # fmt: skip
LENGTHS = (7, 1, 13, 2)


@pytest.fixture(scope="module", autouse=True)
def registered():
    attention.register()


def two(value_head, heads, **changes):
    """The same small model with sdpa and with torch_varlen; `heads` are those of queries and keys."""
    name = changes.pop("model_type", "qwen2")
    shape = {"hidden_size": heads[0] * 8, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    shape |= {"vocab_size": 50, "intermediate_size": 32, "num_hidden_layers": 2, "num_labels": 1} | changes
    # Here, because --fast collects this file too, and this takes four seconds.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    model_class = AutoModelForTokenClassification if value_head else AutoModelForCausalLM
    models = []
    for implementation in ("sdpa", "torch_varlen"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **shape, classifier_dropout=0.0)
        models.append(model_class.from_config(config, attn_implementation=implementation))
        assert models[-1].config._attn_implementation == implementation
    return models


def packed(lengths):
    """Token ids and positions of sequences one after another in one row, as verl packs them."""
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (1, sum(lengths)))
    return ids, torch.cat([torch.arange(length) for length in lengths])[None]


def assert_same_gradients(ours, theirs):
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("value_head", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_packed_sequences_give_the_values_and_gradients_of_separate_ones(heads, value_head, checkpointing):
    sdpa, varlen = two(value_head, heads)
    ids, positions = packed(LENGTHS)
    separate = torch.cat([sdpa(input_ids=row, use_cache=False).logits for row in ids.split(LENGTHS, 1)], 1)
    if checkpointing:
        varlen.train()
        varlen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    together = varlen(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(separate)
    (separate * weight).sum().backward()
    (together * weight).sum().backward()
    assert_same_gradients(varlen, sdpa)


def test_where_sequences_begin_is_found_once_a_pass_and_anew_for_other_positions():
    _, varlen = two(False, (4, 2), num_hidden_layers=3)
    varlen.train()
    varlen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for lengths in (LENGTHS, LENGTHS[::-1]):
        ids, positions = packed(lengths)
        before = attention.sequences.cache_info().misses
        varlen(input_ids=ids, position_ids=positions, use_cache=False).logits.sum().backward()
        assert attention.sequences.cache_info().misses == before + 1


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "gemma3_text"])
def test_every_family_of_models_hands_its_positions_on_and_the_window_of_its_attention(model_type):
    window = {"sliding_window": 4} if model_type == "gemma3_text" else {}
    sdpa, varlen = two(False, (4, 2), model_type=model_type, head_dim=8, **window)
    ids, positions = packed(LENGTHS)
    separate = torch.cat([sdpa(input_ids=row, use_cache=False).logits for row in ids.split(LENGTHS, 1)], 1)
    together = varlen(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("value_head", [False, True])
def test_a_padded_batch_gives_sdpas_values_and_gradients(value_head, left):
    sdpa, varlen = two(value_head, (14, 2))
    lengths = torch.tensor(LENGTHS)
    places = torch.arange(max(LENGTHS))
    mask = (places >= max(LENGTHS) - lengths[:, None]) if left else (places < lengths[:, None])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = packed([mask.numel()])[0].view(mask.shape)
    outputs = [
        model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits[mask]
        for model in (sdpa, varlen)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weight).sum().backward()
    assert_same_gradients(varlen, sdpa)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=3), st.integers(0, 3), st.booleans())
def test_a_token_attends_to_its_own_sequence_up_to_itself_in_any_batch(rows, padding, left):
    """Rows of several sequences each, some of nothing but padding, beside sdpa with the whole mask."""
    width = max(max(sum(row) for row in rows) + padding, 1)
    number, position = (torch.zeros((len(rows), width), dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        first = width - sum(row) if left else 0
        for j, length in enumerate(row):
            number[i, first : first + length], position[i, first : first + length] = j + 1, torch.arange(length)
            first += length
    torch.manual_seed(0)
    query, key, value = (torch.randn(len(rows), heads, width, 8) for heads in (6, 2, 2))
    mask = None if (number > 0).all() else number > 0
    assume((number > 0).any())
    output, _ = attention.torch_varlen(SimpleNamespace(), query, key, value, mask, position_ids=position)
    allowed = (number[:, :, None] == number[:, None]).tril()[:, None]
    whole = scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(output[number > 0], whole[number > 0])
    assert not output[number == 0].any()


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_takes_what_it_is_given_by_torchs_own_shapes(window):
    """On the meta device: the arguments of torch 2.11's function and of later ones differ."""
    query, key, value = (
        torch.empty((20, heads, 64), device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (14, 2, 2)
    )
    borders = torch.tensor([0, 7, 20], dtype=torch.int32, device="meta")
    output = attention.kernel(query, key, value, borders, [7, 13], 0.125, window)
    assert output.shape == query.shape
    output.sum().backward()
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("width", "window"), [(64, None), (128, None), (128, 100)])
@pytest.mark.parametrize("against", ["fp32", "flash_attn"])
def test_on_a_gpu_the_kernel_agrees_with_fp32_and_with_flash_attn(heads, width, window, against):
    flash_attn = pytest.importorskip("flash_attn") if against == "flash_attn" else None
    lengths = [1, 500, 37, 1024]
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    torch.manual_seed(0)
    exact = [torch.randn(sum(lengths), n, width, device="cuda", requires_grad=True) for n in (*heads, heads[1])]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    results = [
        attention.one_by_one(*exact, lengths, width**-0.5, window),
        attention.kernel(*half, borders, lengths, width**-0.5, window),
    ]
    weight = torch.randn_like(results[0])
    for result in results:
        (result.float() * weight).sum().backward()
    for found, wanted in [(results[1], results[0]), *((x.grad, y.grad) for x, y in zip(half, exact, strict=True))]:
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    if flash_attn is None:
        return
    longest = max(lengths)
    theirs = flash_attn.flash_attn_varlen_func(
        *half, borders, borders, longest, longest, causal=True, window_size=(window - 1 if window else -1, 0)
    )
    torch.testing.assert_close(results[1], theirs)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dropout": 0.1}, "no dropout"),
        ({"softcap": 50.0}, "no softcap"),
        ({"s_aux": torch.zeros(2)}, "no s_aux"),
        ({"position_ids": None}, "hand position_ids"),
    ],
)
def test_what_it_cannot_do_is_refused(asked, message):
    query = torch.randn(1, 2, 5, 8)
    asked = {"position_ids": torch.arange(5)[None], **asked}
    with pytest.raises(ValueError, match=message):
        attention.torch_varlen(SimpleNamespace(), query, query, query, None, **asked)
    asked |= {"position_ids": torch.arange(5)[None], "dropout": 0.0, "softcap": None, "s_aux": None}
    attention.torch_varlen(SimpleNamespace(), query, query, query, None, **asked)


def test_the_card_takes_flash_attn_if_it_is_installed_and_torchs_kernels_if_not(tmp_path, monkeypatch):
    models = lambda cfg: (cfg.actor_rollout_ref.model, cfg.critic.model)  # noqa: E731
    cfg = compose("train", "hardware=a800_x1")
    assert {model.override_config.attn_implementation for model in models(cfg)} == {"torch_varlen"}
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    cfg = compose("train", "hardware=a800_x1")
    assert {model.override_config.attn_implementation for model in models(cfg)} == {"flash_attention_2"}


@pytest.mark.parametrize("key", ["actor.fsdp_config", "actor", "ref"])  # verl copies the two into fsdp_config
def test_sequences_that_ranks_share_are_refused_without_flash_attn(key):
    cfg = compose("train", "hardware=a800_x4", f"actor_rollout_ref.{key}.ulysses_sequence_parallel_size=2")
    with pytest.raises(UserError, match="needs flash-attn"):
        check_attention(cfg)
    cfg.actor_rollout_ref.model.override_config.attn_implementation = "flash_attention_2"
    check_attention(cfg)


@pytest.mark.parametrize("hardware", ["cpu", "a800_x1"])
def test_what_verl_loads_for_a_critic_has_the_attention_that_was_asked_for_and_saves_without_its_name(hardware):
    pytest.importorskip("verl")
    from verl.workers.config import HFModelConfig

    from verl_recipes.in_verl.engines import ValueEngine

    options = OmegaConf.to_container(compose("train", f"hardware={hardware}").critic.model, resolve=True)
    engine = object.__new__(ValueEngine)  # its __init__ wants a process group
    named = {key: options[key] for key in ("override_config", "use_remove_padding", "enable_gradient_checkpointing")}
    engine.model_config = HFModelConfig(path=str(TINY), model_type="value_model", load_tokenizer=False, **named)
    engine.engine_config = SimpleNamespace(model_dtype="fp32", forward_only=False, seed=0)
    engine.device_mesh, engine.use_remove_padding, engine.ulysses_sequence_parallel_size = None, True, 1
    before = copy.deepcopy(engine.model_config.hf_config.architectures)
    module = engine._build_module()
    assert type(module).__name__ == "Qwen2ForTokenClassification"
    assert module.config._attn_implementation == named["override_config"]["attn_implementation"]
    assert module.is_gradient_checkpointing == named["enable_gradient_checkpointing"]
    assert module.score.out_features == 1
    assert (engine.model_config.model_type, engine.model_config.hf_config.architectures) == ("value_model", before)
    assert not [key for key in module.config.to_dict() if key.startswith("attn_impl")]
