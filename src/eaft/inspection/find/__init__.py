"""Reads the tables: checks, conflicts, advice, pictures and the report."""
