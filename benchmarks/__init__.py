"""Tables a reader can reproduce."""
