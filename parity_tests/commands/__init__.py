"""The subcommands of `lsce-parity`, one file each. They parse options, print and write; studies compute the results."""
