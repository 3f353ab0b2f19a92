"""Measurements of what this project does, each beside a plain reference in the same process: `python -m benchmarks`."""
