"""Prompts: the bytes of the published recipes, through verl's own classes."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import chatml
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT
from configurations import compose
from omegaconf import OmegaConf
from tokenizers import AddedToken
from transformers import AutoTokenizer

from data_prep.cli import UserError, check
from data_prep.prompts import messages_for
from data_prep.render import (
    TAGS,
    load_tokenizer,
    main,
    pieces,
    render,
    response_begins,
    special_tags,
    token_counter,
)
from data_prep.schema import Prompt, RenderKeys

# The published prompts, from the sources named in the file.
PUBLISHED = json.loads((Path(__file__).parent / "published_prompts.json").read_text())
NAMES = ["tinyzero_base", "tinyzero_instruct", "mini_r1", "datawhale_r1"]
NUMBERS, TARGET = [44, 19, 35], 98


def published(name):
    """What the recipe sent to the model: its text, or its messages by Qwen2.5's ChatML rules with the last one open."""
    prompt = PUBLISHED[name]
    text = prompt.get("text")
    if text is None:
        messages = prompt["messages"]
        if messages[0]["role"] != "system":
            default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            messages = [{"role": "system", "content": default}, *messages]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        text = text.removesuffix("<|im_end|>\n")
    return text.replace("{numbers}", str(NUMBERS)).replace("{target}", str(TARGET))


def prompt_of(name, *overrides):
    return OmegaConf.to_container(compose("render", f"prompt={name}", "tokenizer=x", *overrides).prompt)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    chatml.save(folder)
    return folder


def through_verls_agent_loop(model, prompt):
    """Token ids from verl's single-turn agent loop, with the model configuration that a run has."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopBase, DictConfigWrap
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.workers.config.model import HFModelConfig

    class Loop(AgentLoopBase):
        async def run(self, sampling_params, **kwargs):
            return await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))

    config = HFModelConfig(path=str(model), custom_chat_template=prompt["chat_template"])
    data = {"apply_chat_template_kwargs": prompt.get("template_options", {})}
    trainer = OmegaConf.create({"actor_rollout_ref": {"rollout": {"prompt_length": 10_000}}, "data": data})

    async def ids():
        loop = Loop(
            trainer_config=DictConfigWrap(trainer),
            server_manager=None,
            tokenizer=config.tokenizer,
            processor=config.processor,
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(trainer.data),
            hf_model_type=config.hf_config.model_type,
        )
        return await loop.run({}, raw_prompt=messages_for(prompt, NUMBERS, TARGET))

    return asyncio.run(ids()), config.tokenizer


def through_the_rollouts_on_a_cpu(model, prompt):
    """Token ids from the CPU platform's rollouts."""
    from verl.utils.tokenizer import hf_tokenizer

    from verl_recipes.cpu.batch_rollout import BatchRollout

    rollout = BatchRollout.__new__(BatchRollout)  # without its servers
    rollout.rollout = OmegaConf.create({"prompt_length": 10_000})
    rollout.data = OmegaConf.create({"apply_chat_template_kwargs": prompt.get("template_options", {})})
    rollout.tokenizer, rollout.template = hf_tokenizer(str(model)), prompt["chat_template"]
    return rollout.tokenize({"raw_prompt": messages_for(prompt, NUMBERS, TARGET)})


@pytest.mark.parametrize("name", NAMES)
def test_render_shows_what_verls_agent_loop_sends_and_that_is_what_was_published(model, name):
    prompt = prompt_of(name)
    tokenizer = load_tokenizer(str(model), prompt)
    text, ids = render(tokenizer, messages_for(prompt, NUMBERS, TARGET))
    assert text == published(name)
    sent, verls = through_verls_agent_loop(model, prompt)
    assert (sent, verls.decode(sent)) == (ids, text)


@pytest.mark.parametrize("name", NAMES)
def test_the_rollouts_on_a_cpu_send_the_same(model, name):
    prompt = prompt_of(name)
    assert through_the_rollouts_on_a_cpu(model, prompt) == through_verls_agent_loop(model, prompt)[0]


# What templates of chat models write where a response begins: Qwen3's, one that always opens a thought, a plain one.
BEGINNINGS = {
    "qwen3": "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}",
    "opens": "{{- '<think>\\n' }}",
    "plain": "",
}


@pytest.fixture(scope="module", params=[*BEGINNINGS, "tiny_base"])
def chat_model(request, model, tmp_path_factory):
    """A folder with a tokenizer that has a chat template of its own, and which."""
    if request.param == "tiny_base":
        return ROOT / "assets" / "tiny_base", request.param
    folder, end = tmp_path_factory.mktemp(request.param) / "model", "{%- endif %}"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = chatml.TEMPLATE.removesuffix(end) + BEGINNINGS[request.param] + end
    tokenizer.save_pretrained(folder)
    return folder, request.param


@pytest.mark.parametrize(("name", "thinking"), [("chat", False), ("chat_thinking", True)])
def test_a_chat_models_own_template_gets_its_options_wherever_a_prompt_becomes_tokens(
    tmp_path, chat_model, name, thinking
):
    from verl_recipes.in_verl.sft import Traces

    (folder, kind), prompt = chat_model, prompt_of(name)
    given, messages = prompt["template_options"], messages_for(prompt, NUMBERS, TARGET)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    direct = {"add_generation_prompt": True, "enable_thinking": thinking}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **direct)
    ids = tokenizer.apply_chat_template(messages, return_dict=False, **direct)
    begins = {"opens": "inside a thought", "qwen3": "before any thought" if thinking else "after an empty thought"}
    assert response_begins(text) == begins.get(kind, "before any thought")
    assert render(load_tokenizer(str(folder), prompt), messages, **given) == (text, ids)
    assert through_verls_agent_loop(folder, prompt)[0] == through_the_rollouts_on_a_cpu(folder, prompt) == ids
    assert token_counter(prompt, str(folder))(pa.array([str(NUMBERS)]), pa.array([str(TARGET)])).tolist() == [len(ids)]
    row = [*messages, {"role": "assistant", "content": "1+2"}]
    pq.write_table(pa.table({"messages": [row]}), tmp_path / "traces.parquet")
    config = OmegaConf.create({"max_length": 10_000, "apply_chat_template_kwargs": given})
    assert Traces([str(tmp_path / "traces.parquet")], tokenizer, config).rows[0][0] == ids


@pytest.mark.parametrize("name", ["tinyzero_base", "chat", "chat_thinking"])
def test_verl_gets_the_prompts_options(name):
    cfg = compose("train", f"prompt={name}")
    OmegaConf.resolve(cfg)  # as verl does
    assert cfg.data.apply_chat_template_kwargs == prompt_of(name).get("template_options", {})


def test_the_chat_prompts_have_tinyzeros_words():
    words = PUBLISHED["tinyzero_base"]["text"].partition("User: ")[2].partition("\nAssistant: ")[0]
    for name in ("chat", "chat_thinking"):
        assert prompt_of(name)["messages"] == [{"role": "user", "content": words}]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("enable_thinking=no", "enable_thinking=no should be true or false"),
        ("enable_thinking=[1]", "should be"),
        ("tokenize=true", "tokenize is set by the call"),
    ],
)
def test_an_option_that_no_template_takes_is_refused(option, message):
    with pytest.raises(UserError, match=rf"prompt\.template_options.*{message}"):
        check(compose("render", "prompt=chat", "tokenizer=x", f"++prompt.template_options.{option}"), RenderKeys)


def test_a_text_begins_with_the_tokenizers_token_for_that_if_there_is_one(tmp_path, model):
    prompt, text = prompt_of("tinyzero_base_bos"), published("tinyzero_base")
    assert prompt["messages"] == prompt_of("tinyzero_base")["messages"]
    assert render(load_tokenizer(str(model), prompt), messages_for(prompt, NUMBERS, TARGET))[0] == text
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    shutil.copytree(model, tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    ids, loaded = through_verls_agent_loop(tmp_path / "gemma", prompt)
    assert ids[0] == loaded.bos_token_id
    assert loaded.decode(ids) == f"<bos>{text}"


@pytest.mark.parametrize("name", NAMES)
def test_no_chatml_is_within_chatml(name):
    for message in prompt_of(name)["messages"]:
        assert "<|im_" not in message["content"]
    text = published(name)
    assert text.count("<|im_start|>") - text.count("<|im_end|>") == (name != "tinyzero_base")


@pytest.mark.slow
def test_a_prompt_of_ones_own_comes_from_a_yaml_file(tmp_path, model):
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt/mine.yaml").write_text(
        "defaults: [/chat_template: model]\nname: mine\nmessages:\n"
        "- {role: user, content: '{numbers} -> {target}, {x}'}\n"
    )
    arguments = ["--config-dir", str(tmp_path), "prompt=mine", f"tokenizer={model}", "numbers=[3,4]", "target=7"]
    result = subprocess.run([sys.executable, "-m", "data_prep.render", *arguments], capture_output=True, text=True)
    assert "<|im_start|>user\n[3, 4] -> 7, {x}<|im_end|>\n<|im_start|>assistant\n" in result.stdout, result.stderr
    assert "|<|im_start|>|" in result.stdout


def test_tokens_show_their_bytes_where_they_are_no_character(model):
    tokenizer = load_tokenizer(str(model), prompt_of("datawhale_r1"))
    shown = pieces(tokenizer, tokenizer("用 1+")["input_ids"])
    assert shown == ["<0xE7>", "<0x94>", "<0xA8>", " ", "1", "+"]


def test_lengths_in_the_datasheet_are_those_of_the_prompts(model):
    for name in NAMES:
        prompt = prompt_of(name)
        count = token_counter(prompt, str(model))
        tokenizer = load_tokenizer(str(model), prompt)
        problems = [([1, 2], 3), ([44, 19, 35], 98), ([100, 7, 50, 3, 2, 1], 999)]
        lengths = count(pa.array([str(n) for n, _ in problems]), pa.array([str(t) for _, t in problems]))
        assert lengths.tolist() == [len(render(tokenizer, messages_for(prompt, *p))[1]) for p in problems]


def test_a_prompt_that_hides_the_problem_is_refused():
    cfg = OmegaConf.create({"name": "x", "messages": [{"role": "user", "content": "{numbers}"}]})
    with pytest.raises(UserError, match=r"messages: \{target\} must occur in the messages"):
        check(cfg, Prompt)


@pytest.mark.slow
def test_verls_data_set_loads_every_file_of_every_prompt(tmp_path, model, monkeypatch):
    from test_data import prepare
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.tokenizer import hf_tokenizer

    fewer = ("ood=standard", "ood.size=4", "ood.names=[5_numbers,large_numbers,needs_product]")
    for name in ("tinyzero_base", "datawhale_r1"):
        out = tmp_path / name
        prepare(out, f"prompt={name}", "unsolvable=apart", "train_size=40", "test_size=8", *fewer)
        config = OmegaConf.create(
            {"cache_dir": str(tmp_path), "max_prompt_length": 4000, "filter_overlong_prompts": True}
        )
        files = sorted(map(str, out.glob("*.parquet")))
        data = RLHFDataset(files, hf_tokenizer(str(model)), config)  # all in one, so with one schema
        assert len(data) == 40 + 8 + 3 * 4
        for i in range(len(data)):
            row = data[i]
            truth = row["reward_model"]["ground_truth"]
            assert str(truth["numbers"]) in row["raw_prompt"][0]["content"]
            assert row["data_source"].startswith("countdown/")


@pytest.mark.slow
def test_a_run_whose_chat_template_or_options_are_not_the_datas_is_refused(tmp_path):
    from test_data import prepare

    from verl_recipes.run.preflight import check_prompt as check_run

    prepare(tmp_path / "out", "prompt=mini_r1", "train_size=40", "test_size=8")
    files = str(tmp_path / "out/train.parquet")
    check_run(files, compose("train", "prompt=mini_r1"))
    with pytest.raises(UserError, match="made with prompt=mini_r1, which has another chat template"):
        check_run(files, compose("train", "prompt=tinyzero_base"))
    prepare(tmp_path / "chat", "prompt=chat", "train_size=40", "test_size=8")
    files = str(tmp_path / "chat/train.parquet")
    check_run(files, compose("train", "prompt=chat"))
    for other in (["prompt=chat_thinking"], ["prompt=chat", "~prompt.template_options"]):
        with pytest.raises(UserError, match=r'prompt=chat, which has template_options=\{"enable_thinking": false\};'):
            check_run(files, compose("train", *other))


def test_a_list_of_numbers_is_asked_for_and_never_shown_as_characters():
    with pytest.raises(UserError, match=r"numbers=44 19 35: should be a list, such as \[3,4\]"):
        check(compose("render", "tokenizer=x", "numbers='44 19 35'"), RenderKeys)


def special(folder, model, special):
    """A copy of the tokenizer in which the tags are tokens of their own, special or not."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken(tag, special=special) for tag in TAGS], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tags_that_verl_would_remove_from_responses_are_found_and_the_advice_helps(
    tmp_path, model, monkeypatch, capsys
):
    assert special_tags(load_tokenizer(str(model), prompt_of("mini_r1"))) == []
    assert special_tags(special(tmp_path / "plain", model, False)) == []
    folder = tmp_path / "special"
    assert special_tags(special(folder, model, True)) == list(TAGS)
    monkeypatch.setattr(sys, "argv", ["render", f"tokenizer={folder}"])
    main()
    assert capsys.readouterr().err.startswith(f"warning: {', '.join(TAGS)} are special tokens of")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as special_tags_advice says
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        added = content.get("added_tokens") or content.get("added_tokens_decoder", {})
        for token in added if isinstance(added, list) else added.values():
            token["special"] = token["special"] and token["content"] not in TAGS
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if key in content:
                content[key] = [token for token in content[key] if token not in TAGS]
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    assert special_tags(AutoTokenizer.from_pretrained(folder)) == []


TEXT = 'messages: [{role: user, content: "{numbers} {target}"}]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT, r"prompt\.name= is missing"),
        ("name: x\nmessages:\n\t- a\n", r"mine\.yaml, line 3: found character '\\t'"),
        (
            "name: x\nmessages:\n- {role: user, content: ['{numbers}', '{target}']}\n",
            r"messages\.0\.content=.*: should be",
        ),
        ("name: x\n", r"prompt\.messages= is missing"),
        ("name: x\nmessages: text\n", r"prompt\.messages=text: should be a list"),
        ("name: x\nmessages: [3]\n", r"prompt\.messages\.0=3: "),
        ("- a\n- b\n", r"prompt=\['a', 'b'\]: "),
        ("", r"prompt\.name= is missing"),
        ("name: a\nname: b\n", r"mine\.yaml, line 2: found duplicate key"),
        ("name: x\nnote: y\n" + TEXT, r"prompt\.note=y: there is no such key"),
        ("defaults: 3\n", r"defaults must be a list"),
        ("defaults: [/chat_template: nosuch]\n", r"Could not find 'chat_template/nosuch' \(known: model, "),
        ("name: 用\n".encode("gbk"), r"not in UTF-8"),
    ],
)
def test_a_prompt_file_with_a_mistake_is_one_line(tmp_path, monkeypatch, content, message):
    (tmp_path / "prompt").mkdir()
    name = f"{tmp_path.name}mine"  # its own: Hydra keeps the folders of the cases before it
    path = tmp_path / f"prompt/{name}.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sys, "argv", ["render", "--config-dir", str(tmp_path), f"prompt={name}", "tokenizer=x"])
    with pytest.raises(UserError, match=message) as error:
        main()
    assert "\n" not in str(error.value)
