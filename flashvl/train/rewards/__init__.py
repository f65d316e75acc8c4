"""Rewards of completions: functions with TRL's signature, and how a group is scored by them."""
