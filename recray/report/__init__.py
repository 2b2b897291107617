"""The report of a nightly run: its pages, plots, and what they say of earlier runs and of the inputs."""
