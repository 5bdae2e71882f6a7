"""One module per experiment notebook, the store of sweeps, the organisms."""
