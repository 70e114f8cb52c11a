"""A small world with exact truth: everything that it writes can be parsed, looked up and measured. See README.md."""
