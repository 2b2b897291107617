"""The attention recommender: torch and numpy alone, no files, no Ray. See `recommender` for the whole."""
