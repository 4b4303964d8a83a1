"""The parts that several benchmarks share."""

import sys
from pathlib import Path

# A script's own folder comes first on the path, and in it lies transport.py: the package of that name goes before it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
