"""Taking what a model predicts to where it is used."""
