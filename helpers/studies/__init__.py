"""One module per experiment notebook, the store of sweeps, the organisms."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"study": ["Study", "names", "run"]}
)
