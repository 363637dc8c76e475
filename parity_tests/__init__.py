"""The parity harness: an oracle, computed bounds, cases with traps, adapters, and mutants that prove its strength."""
