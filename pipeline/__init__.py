"""The labelling run: plan, label, commit, account, report."""
