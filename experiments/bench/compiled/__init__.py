"""Programs compiled for devices that are not there, and what they cost."""
