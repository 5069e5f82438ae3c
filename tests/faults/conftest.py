"""The port of a run of several processes is found as launch/local.py finds it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "launch"))
