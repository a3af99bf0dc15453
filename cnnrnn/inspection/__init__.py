"""Looking into a data set with a trained model."""
