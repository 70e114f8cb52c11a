"""The ``rlpt`` command; one file per group of commands."""
