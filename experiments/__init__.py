"""SPENDS compute: the runs that turn settings into a folder of results."""
