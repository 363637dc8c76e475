"""What is right, and how far rounding may go."""
