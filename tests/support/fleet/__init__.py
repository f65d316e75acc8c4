"""Checks of cluster/: each function returns what is wrong, one line each."""
