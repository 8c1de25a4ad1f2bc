"""The report: a page with plots and a gallery that opens from disk."""
