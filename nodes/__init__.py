"""The nodes the artist sees."""
