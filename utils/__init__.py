"""Losses, random streams, data, evaluation and files: what the scripts share."""
