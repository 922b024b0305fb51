"""Tests that need LitServe are in an environment that has it (``run.py``); elsewhere the others run."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
NEED_LITSERVE = ("test_server.py",)
found = importlib.util.find_spec("litserve")  # this folder, where there is none
collect_ignore = [] if found is not None and found.origin else [*NEED_LITSERVE]
