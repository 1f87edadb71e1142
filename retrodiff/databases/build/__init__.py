"""Makes and changes databases: builds, imports, appends, deletions."""
