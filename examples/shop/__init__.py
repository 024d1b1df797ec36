"""A shop of three services: FastAPI takes orders, billing and shipping follow; each part is killed meanwhile, and a table reconciles."""
