from .changes import change, kl_from_clean, log_probabilities  # noqa: F401
from .fluency import FluentRange  # noqa: F401
from .text import (  # noqa: F401
    FIRST_SCORED,
    distance,
    fluent_range,
    joined,
    own_spread,
    surprise,
    token_nll,
)
from .statistics import bootstrap, wilson  # noqa: F401
