"""From judged tables to a page."""
