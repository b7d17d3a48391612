"""Requests in, rows out: sampling, the batch engine, results and log-probabilities."""
