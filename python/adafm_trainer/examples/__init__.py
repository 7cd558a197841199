"""Scripts that use the package as a reader of the papers would."""
