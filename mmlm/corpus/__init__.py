"""raw corpora → Manifest: records, readers, scan, built-in corpora."""
