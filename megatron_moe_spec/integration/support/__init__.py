"""What is not supported, and the remedy."""
