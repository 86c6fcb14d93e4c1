"""Pipelines, and studies of many runs."""
