"""Training: batches and the loop in plain torch, the worker and the trainer on Ray Train."""
