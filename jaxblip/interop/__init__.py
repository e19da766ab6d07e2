"""Weights, configs and processors from and to Hugging Face and LAVIS."""
