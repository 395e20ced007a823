"""The HunyuanVideo-1.5 family."""
