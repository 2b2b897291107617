"""The endpoint: a Ray Serve application over the published snapshot and the predictor of its bundle."""
