"""The subcommands of `lsce-parity`, a file each. They parse, show and write; what they compute is in the modules above."""
