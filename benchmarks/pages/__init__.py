"""What is shown of a record: tables for a terminal and for a page, plots, and where others are better."""
