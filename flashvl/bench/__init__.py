"""Benchmarks of speed: ours and its peers', interleaved in one run on one machine."""
