"""The optional second part of the assignment: instruction tuning, DPO, and four evaluations."""

import plainrl  # noqa: F401  # first: it prepares the process, see plainrl/startup.py
