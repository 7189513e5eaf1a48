"""A run from its command line to its results: workdir, checkpoints, log, tables, figures."""
