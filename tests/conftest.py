"""Models for the tests: a tiny one, one of each architecture family (random, no network), and the real default model."""

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
_CONFIGS = {
    "llama": ("LlamaConfig", dict(num_key_value_heads=2)),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=6)),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=4, n_head=4, n_positions=512)),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {}),
}
ARCHITECTURES = list(_CONFIGS)

# More, for the test of the whole road alone: what each is here for stands behind it.
_GPT = dict(n_embd=32, n_layer=4, n_head=4, n_positions=512)
_CONFIGS |= {
    "llama_untied_mqa": ("LlamaConfig", dict(num_key_value_heads=1, tie_word_embeddings=False)),
    "llama_tied": ("LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=8)),  # norms of queries and keys
    "gemma": (
        "GemmaConfig",
        dict(num_key_value_heads=1, head_dim=8),
    ),  # scaled embeddings, multi-query attention
    "gemma2": (
        "Gemma2Config",
        dict(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=6),
    ),  # post-norms
    "olmo2": ("Olmo2Config", {}),  # post-norms alone
    "phi3": ("Phi3Config", dict(num_key_value_heads=2)),  # one matrix for queries, keys and values
    "falcon": (
        "FalconConfig",
        dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, multi_query=True),
    ),  # parallel
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        dict(_GPT, multi_query=True),
    ),  # multi-query attention, learned positions
    "cohere2": (
        "Cohere2Config",
        dict(num_key_value_heads=2, sliding_window=6),
    ),  # parallel, sliding windows
    "opt": (
        "OPTConfig",
        dict(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=32,
        ),
    ),  # learned positions
    "bloom": ("BloomConfig", dict(hidden_size=32, n_layer=4, n_head=4)),  # ALiBi
    "mpt": (
        "MptConfig",
        dict(d_model=32, n_layers=4, n_heads=4, max_seq_len=512),
    ),  # ALiBi, no biases
    "gptj": ("GPTJConfig", dict(_GPT, rotary_dim=4)),  # parallel, rotary in part
    "starcoder2": ("Starcoder2Config", dict(num_key_value_heads=2, sliding_window=6)),
    "mixtral": ("MixtralConfig", dict(num_key_value_heads=2, num_local_experts=4)),  # experts
    "gpt_oss": (
        "GptOssConfig",
        dict(
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            sliding_window=6,
            rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
    ),  # sinks learned per head
    "granite": ("GraniteConfig", dict(num_key_value_heads=2)),  # multipliers
    "lfm2": (
        "Lfm2Config",
        dict(num_key_value_heads=2, full_attn_idxs=[1, 3]),
    ),  # convolutions between
    "falcon_h1": (
        "FalconH1Config",
        dict(
            num_key_value_heads=2,
            head_dim=8,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
        ),
    ),  # attention beside a state space, which heeds the mask
}
ALL_ARCHITECTURES = list(_CONFIGS)
_WITHOUT_COMMON = (
    "gpt2",
    "falcon",
    "gpt_bigcode",
    "opt",
    "bloom",
    "mpt",
    "gptj",
)  # they spell these settings in other words


def tiny_model(architecture: str, seed: int = 0) -> LanguageModel:
    """A small random model of the given architecture, with the byte tokenizer; GPT-2 goes without a chat template."""
    kind, settings = _CONFIGS[architecture]
    tokenizer = byte_tokenizer()
    if architecture == "gpt2":
        tokenizer.chat_template = None
    common = {} if architecture in _WITHOUT_COMMON else _COMMON
    config = getattr(transformers, kind)(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        **common,
        **settings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return LanguageModel(
        f"tiny-{architecture}", random_weights_(model, seed), tokenizer, f"{architecture}-{seed}"
    )


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
