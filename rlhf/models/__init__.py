"""Loading, the scalar head, the actor-critic, and frozen models with their placement.

Nothing is imported here: transformers takes seconds, so it is loaded where a model is.
"""
