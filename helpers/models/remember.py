"""Results kept for as long as the model that they belong to, and no longer."""

from functools import wraps
from weakref import WeakKeyDictionary


def remembered(function):
    """Decorator for `function(lm, *args, **kwargs)`: computed once for each model and arguments (hashable ones).

    The model is held weakly, so a result goes with it; the result itself must not refer to the model, which would pin it.
    """
    kept = WeakKeyDictionary()  # lm → {arguments: result}

    @wraps(function)
    def once(lm, *args, **kwargs):
        results = kept.setdefault(lm, {})
        key = (args, tuple(sorted(kwargs.items())))
        if key not in results:
            results[key] = function(lm, *args, **kwargs)
        return results[key]

    return once
