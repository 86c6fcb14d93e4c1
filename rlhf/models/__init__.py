"""Loading, the scalar head, the actor-critic, and frozen models. transformers is imported only to load a model."""
