"""Callbacks: what is watched and written while a stage runs."""
