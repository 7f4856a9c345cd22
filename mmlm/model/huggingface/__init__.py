"""Trunks in the forms that Hugging Face transformers knows, both ways: settings and names of tensors."""
