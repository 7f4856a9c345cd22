"""one term of the loss per file; objectives.py adds them up."""
