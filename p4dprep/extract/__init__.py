"""Plan, fingerprint, the Ray pipeline, resume and report."""
