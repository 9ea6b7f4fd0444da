"""The package side by side with the tools one would otherwise pick: ``python -m benchmarks``."""
