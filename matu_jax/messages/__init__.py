"""What clients and server send each other: messages as bytes, their precision, and their bits."""
