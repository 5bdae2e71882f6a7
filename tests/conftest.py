"""Models for the tests: a tiny one, one of each architecture family (random, no network), and the
real default model."""

import pytest
import torch
import transformers

from helpers.models import DEFAULT, LanguageModel, ModelError, byte_tokenizer, load, random_weights_

# Four blocks of width 32 each; a window of 6 tokens is smaller than the prompts of the tests.
_COMMON = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=512,
)
_PLAIN = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
_GPT = dict(n_embd=32, n_layer=4, n_head=4, n_positions=512)
_KV = dict(_COMMON, num_key_value_heads=2)
_WINDOW = dict(_KV, sliding_window=6)
_GEMMA = dict(_WINDOW, head_dim=8, query_pre_attn_scalar=8)
_ROPE = dict(rope_type="default", rope_theta=1e4)
_CONFIGS = {
    "llama": ("LlamaConfig", _KV),
    "qwen2": ("Qwen2Config", _KV),
    "mistral": ("MistralConfig", _WINDOW),
    "gemma3": (
        "Gemma3TextConfig",
        dict(_GEMMA, layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "phi": ("PhiConfig", _COMMON),
}
ARCHITECTURES = list(_CONFIGS)

# More, for the tests of the sites and of the whole road: what each is here for stands before it.
_CONFIGS |= {
    "llama_untied_mqa": ("LlamaConfig", dict(_COMMON, num_key_value_heads=1)),
    "llama_tied": ("LlamaConfig", dict(_KV, tie_word_embeddings=True)),
    # norms of queries and keys
    "qwen3": ("Qwen3Config", dict(_KV, head_dim=8)),
    # scaled embeddings, multi-query attention
    "gemma": ("GemmaConfig", dict(_COMMON, num_key_value_heads=1, head_dim=8)),
    # post-norms; post-norms alone
    "gemma2": ("Gemma2Config", _GEMMA),
    "olmo2": ("Olmo2Config", _COMMON),
    # one matrix for queries, keys and values
    "phi3": ("Phi3Config", _KV),
    # parallel; multi-query attention and learned positions; parallel with sliding windows
    "falcon": ("FalconConfig", dict(_PLAIN, multi_query=True)),
    "gpt_bigcode": ("GPTBigCodeConfig", dict(_GPT, multi_query=True)),
    "cohere2": ("Cohere2Config", _WINDOW),
    # learned positions
    "opt": (
        "OPTConfig",
        dict(_PLAIN, ffn_dim=64, max_position_embeddings=512, word_embed_proj_dim=32),
    ),
    # ALiBi; ALiBi without biases
    "bloom": ("BloomConfig", dict(hidden_size=32, n_layer=4, n_head=4)),
    "mpt": ("MptConfig", dict(d_model=32, n_layers=4, n_heads=4, max_seq_len=512)),
    # parallel, rotary in part
    "gptj": ("GPTJConfig", dict(_GPT, rotary_dim=4)),
    "starcoder2": ("Starcoder2Config", _WINDOW),
    # experts; experts, and sinks learned per head
    "mixtral": ("MixtralConfig", dict(_KV, num_local_experts=4)),
    "gpt_oss": (
        "GptOssConfig",
        dict(_WINDOW, head_dim=8, num_local_experts=4, rope_parameters=_ROPE),
    ),
    # multipliers
    "granite": ("GraniteConfig", _KV),
    # convolutions between; attention beside a state space, which heeds the mask
    "lfm2": ("Lfm2Config", dict(_KV, full_attn_idxs=[1, 3])),
    "falcon_h1": (
        "FalconH1Config",
        dict(_KV, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    ),
}
ALL_ARCHITECTURES = list(_CONFIGS)


def tiny_model(architecture: str, seed: int = 0) -> LanguageModel:
    """A small random model of the given architecture, with the byte tokenizer; GPT-2 goes without a
    chat template."""
    kind, settings = _CONFIGS[architecture]
    tokenizer = byte_tokenizer()
    if architecture == "gpt2":
        tokenizer.chat_template = None
    config = getattr(transformers, kind)(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    name, weights = f"tiny-{architecture}", random_weights_(model, seed)
    return LanguageModel(name, weights, tokenizer, f"{architecture}-{seed}")


def pytest_collection_modifyitems(config, items):
    """What lies in tests/slow is slow."""
    for item in items:
        if "slow" in item.path.relative_to(config.rootpath).parts:
            item.add_marker("slow")


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
