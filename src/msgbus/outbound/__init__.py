"""A message's way out: writer (model → envelope), then pipeline (middleware, batching, the adapter)."""
