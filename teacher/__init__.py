"""The networks that label, their checkpoints, and the way from a photograph to a label."""
