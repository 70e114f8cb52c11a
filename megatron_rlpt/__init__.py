"""Self-improving pretraining: a teacher rewrites and judges, the policy learns from the best candidates."""

__version__ = "0.1.0"
