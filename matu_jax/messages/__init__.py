"""What clients and server send each other: files, their precision, and their bits."""
