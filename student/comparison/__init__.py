"""Students that differ in their labels only, trained, compared and drawn."""
