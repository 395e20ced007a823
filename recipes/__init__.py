"""How the packaged models were made. Recipes import `vlmteacher` and are no part of the installed package."""
