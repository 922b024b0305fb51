"""Tests that need vLLM are in an environment that has it (``run.py``); elsewhere the others run."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
NEED_VLLM = ("test_engine.py", "test_server.py", "test_hooks.py")
# This folder has its name, too.
spec = importlib.util.find_spec("vllm")
collect_ignore = [] if spec and spec.origin else [*NEED_VLLM]
