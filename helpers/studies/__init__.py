"""One module per experiment notebook, the store of sweeps, the organisms."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules={
        "anti_refusal",
        "arithmetic",
        "backdoors",
        "chain_of_thought",
        "explorer",
        "goldilocks",
        "organisms",
        "store",
        "sweeps",
    },
    submod_attrs={"study": ["Study", "names", "run"]},
)
