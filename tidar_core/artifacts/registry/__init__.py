"""MLflow's registry: versions, aliases, promotions, runs."""
