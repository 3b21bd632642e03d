"""Commands of the command line that are too long for `audiozoo/cli.py`, and what they share with it."""
