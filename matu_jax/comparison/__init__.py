"""Many algorithms in the same settings: what is compared, and how it is told."""
