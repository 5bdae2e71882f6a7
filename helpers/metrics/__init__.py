"""How large a change is, what a text does, scores and intervals."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "behaviours": [
            "refuses",
            "works_in_steps",
            "answer_of",
            "is_right",
            "payload",
            "mentions",
            "kind_of_answer",
            "cut",
        ],
        "fluency": ["distinct2", "FluentRange", "variety"],
        "measures": [
            "FIRST_SCORED",
            "change",
            "log_probabilities",
            "kl",
            "scaled_to_effect",
            "kl_next_token",
            "kl_from_clean",
            "kl_along",
            "joined",
            "token_nll",
            "surprise",
            "fluent_range",
            "embed",
            "distance",
            "own_spread",
            "diversity",
            "wilson",
            "bootstrap",
        ],
        "statistics": ["auc", "roc", "permutation_p", "missed", "needed", "mahalanobis"],
    },
)
