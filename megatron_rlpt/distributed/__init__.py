"""Ranks, processes, addresses: how the parts of a run find each other, start and end."""
