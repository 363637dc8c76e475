"""Two training runs against each other."""
