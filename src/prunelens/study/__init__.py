"""Many runs, tables, summaries."""
