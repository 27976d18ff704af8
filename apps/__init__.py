"""The command line, the report writer and the explorer: no mathematics, only calls."""
