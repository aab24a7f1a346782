"""Python loads this module first in every process that tests start, those of Ray among them."""

import gc

gc.set_threshold(50_000, 20, 10)  # as tidar_core/garbage.py: hundreds of processes import Ray
