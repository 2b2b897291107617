"""Jobs that people submit; each is a thin shell over `recray.pipeline`."""
