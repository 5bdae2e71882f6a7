"""Obtain and load a language model, find its blocks; chat prompts and the prompt sets."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loading": ["TINY", "DTYPES", "LanguageModel", "load", "with_adapter", "random_weights_", "byte_tokenizer"],
        "obtain": [
            "DEFAULT",
            "PACKAGE",
            "WHEEL",
            "MEMBER",
            "SHA256",
            "ModelError",
            "cache_folder",
            "default_folder",
            "quiet",
            "REASONS",
            "why",
            "brief",
        ],
    },
)
