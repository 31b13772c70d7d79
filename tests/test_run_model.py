"""What is refused of a model, a tokenizer or one's own data before anything heavy starts."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import compose
from omegaconf import OmegaConf

from data_prep.cli import CONFIGS, UserError
from data_prep.render import load_tokenizer
from verl_recipes.planning.memory import shape_of
from verl_recipes.planning.model import count_in_files
from verl_recipes.run import model as checks
from verl_recipes.run.preflight import check_curriculum, check_data, check_export, check_settings
from verl_recipes.settings.configuration import check_choice

TINY = CONFIGS.parent / "assets" / "tiny_base"
PASS_THROUGH = "{{ messages[-1]['content'] }}"


@pytest.fixture
def model(tmp_path):
    """A function that changes a JSON file of a copy of the tiny base; returns the folder."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)

    def change(name, **values):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | values), encoding="utf-8")
        return folder

    return change


def settings(path, **values):
    return OmegaConf.create(
        {"path": str(path), "custom_chat_template": PASS_THROUGH, "use_remove_padding": True, **values}
    )


@pytest.mark.parametrize("inside", [False, True])
def test_a_prompt_without_the_token_with_which_the_models_texts_begin_is_refused(model, inside):
    begins = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}
    byte_level = {"type": "ByteLevel", "trim_offsets": True}
    processor = {"type": "Sequence", "processors": [byte_level, begins]} if inside else begins
    path = model("tokenizer.json", post_processor=processor)
    with pytest.raises(UserError, match=r"begin with <s>, which .* prompt=tinyzero_base_bos"):
        checks.check_beginning(settings(path))
    for template in (None, "{{ bos_token }}" + PASS_THROUGH, "<s>" + PASS_THROUGH):
        checks.check_beginning(settings(path, custom_chat_template=template))
    check_export(compose("train", f"actor_rollout_ref.model.path='{path}'"), path.with_name("out"), "float32")
    checks.check_beginning(settings(model("tokenizer_config.json", add_bos_token=False)))
    model("tokenizer_config.json", add_bos_token=None)
    checks.check_beginning(settings(model("tokenizer.json", post_processor=byte_level)))


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"model_type": "gpt2"}, "is a gpt2, which verl"),
        ({"text_config": {"model_type": "gpt_neox"}}, "is a gpt_neox, which verl"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized \(fp8\)"),
        ({"layer_types": ["full_attention", "conv"]}, "use_remove_padding=false"),
        ({"mamba_d_ssm": 1, "layer_types": None}, "use_remove_padding=false"),
        ({"text_config": {"model_type": "x"}, "quantization_config": {"quant_method": "fp8"}}, r"is quantized \(fp8\)"),
    ],
)
def test_a_kind_of_model_that_verl_does_not_train_is_refused(model, config, refused):
    path = model("config.json", mamba_d_conv=4, layer_types=["attention"])  # as a Granite without such layers
    checks.check_kind(settings(path))
    with pytest.raises(UserError, match=refused):
        checks.check_kind(settings(model("config.json", **config)))
    if "padding" in refused:
        checks.check_kind(settings(path, use_remove_padding=False))


def test_a_models_positions_are_those_that_verl_takes(model):
    path = model("config.json", max_position_embeddings=1024, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert checks.positions_of(path) == 1024
    assert checks.positions_of(model("config.json", text_config={"max_position_embeddings": 77})) == 77


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_model_of_another_size_than_the_one_that_is_named_is_refused(model, size):
    path = model("config.json")
    cfg = compose("train", f"actor_rollout_ref.model.path='{path}'")
    checks.check_same_model(cfg)
    model("config.json", **{size: 1})
    with pytest.raises(UserError, match="is not the model that model= names"):
        checks.check_same_model(cfg)


def test_plan_names_what_a_models_configuration_lacks(model):
    path = model("config.json")
    (path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 768, "vocab_size": 50257}', encoding="utf-8")
    cfg = compose("train", "model=local", f"actor_rollout_ref.model.path='{path}'")
    with pytest.raises(UserError, match="has no hidden_size, intermediate_size, num_attention_heads"):
        shape_of(cfg)


def test_mistrals_own_file_of_the_same_weights_is_not_counted(model):
    path = model("config.json")
    shutil.copy(path / "model.safetensors", path / "consolidated.safetensors")
    assert count_in_files(path) == count_in_files(TINY)


def test_of_a_hubs_model_only_the_small_files_are_fetched(monkeypatch, tmp_path):
    def fetched(name, revision, allow_patterns):
        assert (name, revision) == ("some/model", "0123")
        assert not any(Path("model.safetensors").match(each) for each in allow_patterns)
        return str(tmp_path)

    assert checks.small_files(TINY) == TINY
    monkeypatch.setattr(checks, "find_model", lambda _: None)
    monkeypatch.setattr(checks, "check_hub", lambda _: "0123")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert checks.small_files(Path("some/model")) == tmp_path


def test_a_tokenizer_with_code_is_loaded_without_a_question_and_not_trusted(model, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    model("config.json", model_type="own", auto_map={"AutoConfig": "code.Own"})
    path = model("tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Own", None]}, tokenizer_class="Own")
    with pytest.raises(UserError, match="contains custom code"):
        load_tokenizer(str(path), {"name": "x", "chat_template": PASS_THROUGH})


def test_gemma_has_no_critic():
    with pytest.raises(UserError, match="no critic of Gemma"):
        check_choice(compose("train", "recipe=tinyzero_ppo", "model=gemma3_1b", "hardware=h100"))


def test_a_tokenizer_beside_the_model_is_refused():
    cfg = compose("train", "actor_rollout_ref.model.tokenizer_path=elsewhere")
    with pytest.raises(UserError, match="tokenizer_path=elsewhere: checks, samples and exports read"):
        check_settings(cfg)


@pytest.fixture
def data(tmp_path):
    """A function that writes one row of one's own data with these columns; returns the file."""
    message = [{"role": "user", "content": "x"}]
    row = {"data_source": "x", "prompt": message, "reward_model": {"ground_truth": {"numbers": [1], "target": 1}}}

    def write(**columns):
        pq.write_table(pa.Table.from_pylist([row | columns]), tmp_path / "train.parquet")
        return str(tmp_path / "train.parquet")

    return write


def test_a_prompt_that_is_no_list_of_messages_is_refused(data):
    check_data(compose("train"), "data.train_files", data())
    with pytest.raises(UserError, match=r"data.train_files: prompt in .* is string; a list of messages"):
        check_data(compose("train"), "data.train_files", data(prompt="Solve it"))
    file = Path(data(prompt="Solve it"))
    pq.write_table(pq.read_table(file)[:0], empty := file.with_name("empty.parquet"))
    with pytest.raises(UserError, match=r"prompt in .*empty.parquet is string; a list"):
        check_data(compose("train"), "data.train_files", [data(), str(empty)])


@pytest.mark.parametrize("content", ["[1, 2]", '{"files": ["t.parquet"]}', '{"configuration": "x"}'])
def test_another_programs_manifest_beside_the_data_is_no_fault(data, content):
    Path(file := data()).with_name("manifest.json").write_text(content, encoding="utf-8")
    check_data(compose("train"), "data.train_files", file)


@pytest.mark.parametrize("info", [{}, {"extra_info": "x"}, {"extra_info": {"difficulty": "easy"}}])
def test_problems_without_a_number_for_their_difficulty_have_no_curriculum(data, info):
    with pytest.raises(UserError, match=r"1 of 1 problems in .* have no difficulty"):
        check_curriculum(compose("train", f"data.train_files='{data(**info)}'", "curriculum=balanced"))
