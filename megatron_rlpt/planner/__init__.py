"""What a run will need, how fast it will be and what it will cost, before it is queued. Imports no torch."""
