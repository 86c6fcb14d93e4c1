"""The embedded data: posts told from hidden facts."""
