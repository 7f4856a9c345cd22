"""mmlm: raw text, pictures and sound in; an evaluated, registered and served multimodal language model out."""

__version__ = "0.1.0"
