"""What has to be measured where a GPU is: `python -m benchmarks.gpu.NAME [--json]`. Numbers first, then time."""
