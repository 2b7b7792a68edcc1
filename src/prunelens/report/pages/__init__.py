"""The HTML page of each kind of result."""
