"""The demonstration: a table of pictures as people have them, captioned, and a report of it."""
