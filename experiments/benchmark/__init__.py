"""Speed: this code against TRL, and this code on a GPU. `uv run python -m experiments.benchmark` says how."""
