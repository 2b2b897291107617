"""From event files to a dataset: read, check, partition by user, sort, split. Runs on Ray Data."""
