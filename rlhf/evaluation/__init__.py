"""Tables of responses, margins and judgements, and their statistics."""
