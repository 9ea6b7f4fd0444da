"""The tail fit near b = 1 against its definition: ``python -m studies.tail``."""
