"""Which method distils best on the pocket world: runs, metrics, statistics and the report."""
