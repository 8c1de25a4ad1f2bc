"""One run folder: what it holds, and how its labels are stored and read."""
