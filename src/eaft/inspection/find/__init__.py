"""What the tables say: checks, conflicts, advice, pictures and the report."""
