"""Which prior distils best, measured on the pocket world, and the report."""
