"""What is solved: maps of rows to rows, each with the structure that it declares."""
