"""How the packaged Teacher was trained."""
