"""Model registry in MLflow: versions, aliases, promotions, runs."""
