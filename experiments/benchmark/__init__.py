"""This code against TRL, on one machine: `uv run python -m experiments.benchmark`."""
