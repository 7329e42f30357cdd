"""The built-in passes: a plug-in package like any other, one pass per file."""
