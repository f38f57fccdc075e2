"""The machinery behind the scripts."""
