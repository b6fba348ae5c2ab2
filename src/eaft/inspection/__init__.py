"""`eaft inspect` and `eaft view`: data scored by a model, a report on it, and a page to explore."""
