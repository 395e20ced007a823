"""How the packaged microworld pair was trained: `python -m recipes.microworld list`, `stage` and `replay`."""
