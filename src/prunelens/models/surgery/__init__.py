"""Take parts out of a network, and what stands in their place."""
