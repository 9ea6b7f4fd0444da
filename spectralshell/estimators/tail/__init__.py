"""The tail fit: data, models, solving, evidence, fitted rows, and the estimator."""
