"""What is run with the scripts: `uv run python -m experiments.NAME`."""

import plainrl  # noqa: F401  # first: it prepares the process, see plainrl/startup.py
