"""Choose the images or regions of a run whose correction is worth most of a person's time."""
