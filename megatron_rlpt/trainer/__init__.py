"""The trainer's spine. ``train.py`` is the loop; the other files are what it calls."""
