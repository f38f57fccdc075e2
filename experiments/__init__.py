"""What is run with the scripts: `uv run python -m experiments.NAME`."""
