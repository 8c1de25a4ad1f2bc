"""Read a finished run: statistics, differences, audits."""
