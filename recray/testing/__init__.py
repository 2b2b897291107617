"""For tests and benchmarks: synthetic data, published runs, a local Ray cluster, load on an endpoint."""
