"""Puts tests/ on the path, for test_dcgen.py beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))
