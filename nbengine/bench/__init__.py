"""The product's own benchmark: `python -m nbengine.bench COMMAND`. benchmarks/README.md says what each command measures."""
