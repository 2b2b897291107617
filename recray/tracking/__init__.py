"""MLflow: one run per trained bundle. The only importer of mlflow."""
