"""What is worth a person's time: the images or regions of a run whose correction gains most."""
