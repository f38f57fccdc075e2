"""What is run with the scripts: `uv run python -m experiments.NAME`."""

import plainrl  # noqa: F401  # first: it prepares the process, see plainrl/startup.py
from experiments.usage import check_arguments

check_arguments()
