"""Demonstrations: a varied table of pictures with a report of its captions, and tilings drawn."""
