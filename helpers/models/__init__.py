"""Obtain and load a language model, find its blocks; chat prompts and the prompt sets."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["prompts"],
    submod_attrs={
        "language_model": ["LanguageModel"],
        "loading": ["TINY", "DTYPES", "load", "with_adapter", "random_weights_", "byte_tokenizer"],
        "remember": ["remembered"],
        "packaged": ["DEFAULT", "PACKAGED"],
        "obtain": ["ModelError", "cache_folder", "packaged_folder", "quiet", "why", "brief"],
    },
)
