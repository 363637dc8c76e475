"""Does label smoothing help? A study of five tasks. docs/does-it-help.md."""
