"""The page of `eaft view`, its server, and the queries that it answers from the tables."""
