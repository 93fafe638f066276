"""Found in place of the root's configurator.py when a tool is run as a file: it says how to run that."""

import sys
from pathlib import Path

tool = Path(sys.argv[0]).stem
sys.exit(f"lab/{tool}.py is run from the root of the repository, as: python -m lab.{tool}")
