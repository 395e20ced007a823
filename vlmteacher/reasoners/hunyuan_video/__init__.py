"""The HunyuanVideo family."""
