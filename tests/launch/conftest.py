"""The scripts of `launch/` are run where they lie; their tests import what needs no process of its own."""

import sys
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))
