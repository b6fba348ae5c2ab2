"""`eaft tune`: the model of one training run that learned most within a forgetting budget."""
