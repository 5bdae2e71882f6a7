"""The model that everything uses unless told otherwise. Nothing here needs torch."""

DEFAULT = "SmolLM2-135M-Instruct"
