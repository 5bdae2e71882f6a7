"""Models for the tests: a tiny one, one of each architecture family (random, no network), and the real default model."""

import pytest
import torch
import transformers

from helpers.models import DEFAULT, LanguageModel, ModelError, _byte_tokenizer, load, random_weights_

# Four blocks of width 32 each; a window of 6 tokens is smaller than the prompts of the tests.
_COMMON = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, max_position_embeddings=512)
_CONFIGS = {
    "llama": ("LlamaConfig", dict(num_key_value_heads=2)),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=6)),
    "gemma3": ("Gemma3TextConfig", dict(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=6,
                                        layer_types=["sliding_attention", "full_attention"] * 2)),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=4, n_head=4, n_positions=512)),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {}),
}
ARCHITECTURES = list(_CONFIGS)


def tiny_model(architecture: str, seed: int = 0) -> LanguageModel:
    """A small random model of the given architecture, with the byte tokenizer; GPT-2 goes without a chat template."""
    kind, settings = _CONFIGS[architecture]
    tokenizer = _byte_tokenizer()
    if architecture == "gpt2":
        tokenizer.chat_template = None
    common = {} if architecture == "gpt2" else _COMMON
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, **common, **settings,
                                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return LanguageModel(f"tiny-{architecture}", random_weights_(model, seed), tokenizer, f"{architecture}-{seed}")


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    return load("tiny-random")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architectures(request) -> LanguageModel:
    """The same test on every architecture."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def default_lm() -> LanguageModel:
    """The real default model; a test that uses it is skipped where it cannot be had."""
    try:
        return load(DEFAULT)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("WORKBOOK_CACHE", str(folder))
    return folder
