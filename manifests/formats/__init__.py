"""Labels in the forms of other tools: written for them, and read back when people have corrected them."""
