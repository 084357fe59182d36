"""Which prior distils best, measured on the pocket world: runs, metrics, statistics and the report."""
