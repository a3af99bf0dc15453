"""What is saved and loaded: a classifier, an ensemble, their folder."""
