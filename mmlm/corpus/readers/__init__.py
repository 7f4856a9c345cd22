"""One module per form that a corpus may have; each yields drafts and refusals."""
