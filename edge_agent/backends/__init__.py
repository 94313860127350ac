"""One module per kind of engine, imported only inside a worker."""
