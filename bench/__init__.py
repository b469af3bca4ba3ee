"""Benchmarks: `pytest bench/`, and the commands `python -m bench.<name>`."""
