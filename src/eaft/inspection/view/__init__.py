"""The page of `eaft view`: questions answered from the tables, and the server."""
