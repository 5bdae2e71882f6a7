"""Slow and plain versions to compare with."""

from test_residual import (  # noqa: F401
    PARALLEL,
    PROMPTS,
    few,
    ids_of,
    one_thread,
    picked,
    plain_add,
    run_plain,
    some_vectors,
)
