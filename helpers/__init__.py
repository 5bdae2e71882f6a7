"""Helpers of the workbook: everything that would make its notebooks long."""
import os

# OpenMP's threads spin for milliseconds while they wait; on a laptop that does other things too, a step then takes up to five
# times as long. Spinning briefly costs nothing measurable on a free machine. Heeded by kernels and by a torch imported later.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
