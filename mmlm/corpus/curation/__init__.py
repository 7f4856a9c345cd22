"""Curation: which records of a corpus are worth training on, and what in them must not be seen."""
