"""MLflow: one run per trained model bundle. No other package imports mlflow."""
