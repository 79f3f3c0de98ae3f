"""Loading: from a source to batches, by worker processes and a cache of decoded images."""
