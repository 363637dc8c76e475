"""The subcommands of `lsce-parity`, a file each: they parse, show and write. What they show is computed elsewhere."""
