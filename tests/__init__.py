"""Tests of the packages, the examples, the benchmarks and the tools."""
