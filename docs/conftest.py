"""What pytest leaves alone here: the gallery is run by ``tests/test_docs.py``."""

collect_ignore = ["conf.py", "examples"]
