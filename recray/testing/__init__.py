"""What tests, benchmarks and users' own tests are made with: synthetic data, published runs, a cluster of one node, a load."""
