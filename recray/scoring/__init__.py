"""The nightly batch: every user of a dataset through the predictor, on Ray Data, into a snapshot."""
