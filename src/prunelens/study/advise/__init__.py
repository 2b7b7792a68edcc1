"""Search for the strongest recipe that keeps a use."""
