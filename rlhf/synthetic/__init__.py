"""The embedded data: posts written from hidden facts, and a small model."""
