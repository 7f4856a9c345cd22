"""Workflow definitions (Dagster): every verb an asset, a blocking check before registration, a schedule, a sensor."""
