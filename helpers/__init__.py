"""Helpers of the workbook: everything that would make its notebooks long, in ten rooms.

A room's `__init__` lists what it offers and imports it on first use (`from helpers.models import
load`, `from helpers import figures`), so that a reader of stored sweeps never waits for torch.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
DATA = ROOT / "data"

# OpenMP's threads spin for milliseconds while they wait; on a laptop that does other things too, a
# step then takes up to five times as long. Spinning briefly costs nothing measurable on a free
# machine. Heeded by kernels and by a torch imported later.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")


class UserError(ValueError):
    """Something the person at the keyboard can put right, said in one sentence."""
