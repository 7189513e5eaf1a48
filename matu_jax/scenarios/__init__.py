"""What happens to clients: failures, attacks, privacy."""
