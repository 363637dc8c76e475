"""What is measured and counted, and how: losses and their peers, clocks, workers, sessions, verdicts."""
