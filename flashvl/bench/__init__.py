"""Benchmarks of speed: Flash-VL and its peers, measured in turn in one run on one machine."""
