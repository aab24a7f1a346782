"""Garbage is looked for rarely during a start, and as usual afterwards."""

import gc
import runpy
from pathlib import Path

from tidar_core.garbage import THRESHOLDS, rare_collection

SUPPORT = Path(__file__).parents[1] / "support"


def test_thresholds_are_high_within_and_those_of_before_afterwards():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        gc.set_threshold(700, 10, 10)
        with rare_collection():
            assert gc.get_threshold() == THRESHOLDS
            kept = [[] for _ in range(1000)]
        assert gc.get_threshold() == (700, 10, 10)
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.set_threshold(*before)


def test_processes_of_tests_begin_with_the_same_thresholds():
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        runpy.run_path(str(SUPPORT / "startup/sitecustomize.py"))
        assert gc.get_threshold() == THRESHOLDS
    finally:
        gc.set_threshold(*before)
