"""What is read from a run: statistics, differences, audits."""
