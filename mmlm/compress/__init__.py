"""a smaller model: verb distill."""
