"""Readers of corpora: one file per storage format."""
