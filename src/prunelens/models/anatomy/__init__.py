"""Where the parts of a network are, proved by rebuilding the residual stream."""
