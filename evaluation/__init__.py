"""Which method distils best on the world of shapes: runs, metrics, statistics and the report."""
