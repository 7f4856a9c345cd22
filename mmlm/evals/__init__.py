"""answers, scores with intervals, plots, the report; verb evaluate."""
